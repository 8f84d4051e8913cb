"""Plants small named faults in a copy of the source, one at a time, and sees that the tests catch each.

    make mutants                      all of them
    make mutants ARGS="swapped_kl"    those whose names hold a word

A fault that no test catches is a hole in the tests: the command then exits with 1. What is left out: faults that
change no number (messages, speed), which other tests hold.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """In `file`, `old` (which must stand there once) becomes `new`; `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "dropped_stop_gradient",
        "loss/surrogate.py",
        "logp.detach() if logp_old is None",
        "logp if logp_old is None",
        "test_methods.py test_loss.py",
    ),
    Mutant(
        "swapped_kl",
        "methods/opsd.py",
        "clipped_kl(teacher, own,",
        "clipped_kl(own, teacher,",
        "test_methods.py test_rlsd_facts.py",
    ),
    Mutant(
        "teacher_gets_gradient",
        "methods/objective.py",
        "TokenDist(logits[view].detach(), batch.tokens)",
        "TokenDist(logits[view], batch.tokens)",
        "test_methods.py",
    ),
    Mutant(
        "per_micro_batch_mean",
        "train.py",
        "weight[rows] * correction[rows]",
        "weight[rows] / weight[rows].sum() * correction[rows]",
        "test_train.py",
    ),
    Mutant(
        "first_step_unwatched",
        "assemble.py",
        "return Ground(run, checked(method), ",
        "return Ground(run, method, ",
        "test_own_method.py",
    ),
    Mutant(
        "chunk_dependence_unseen",
        "methods/check.py",
        "return bool((one - other).abs().max() > CLOSE",
        "return bool((one - other).abs().max() < -CLOSE",
        "test_own_method.py",
    ),
    Mutant(
        "response_offset_off_by_one",
        "tensors.py",
        "predict[index] = [last, ",
        "predict[index] = [last - 1, ",
        "test_tensors.py test_score.py",
    ),
    Mutant(
        "evidence_cut_from_the_left",
        "data/render.py",
        "return text[:end], len(ids) - max_tokens",
        "return text[len(text) - end:], len(ids) - max_tokens",
        "test_data.py test_privilege.py",
    ),
    Mutant(
        "unsaved_teachers",
        "session.py",
        "if held := parts.teachers.state_tensors():",
        "if held := {}:",
        "test_resume.py",
    ),
    Mutant(
        "cursor_not_restored",
        "session.py",
        'self.parts.cursor.load_state(state["cursor"])',
        "pass",
        "test_resume.py",
    ),
    Mutant(
        "health_not_restored",
        "session.py",
        'self.health.load(state["health"])',
        "pass",
        "test_train.py",
    ),
    Mutant(
        "biased_standard_deviation",
        "credit/group.py",
        "(count - 1).clamp_min(1)",
        "count.clamp_min(1)",
        "test_credit.py test_methods.py",
    ),
    Mutant(
        "dead_group_not_exactly_zero",
        "credit/group.py",
        "(spread <= EQUAL * largest.clamp_min(1))",
        "(spread < 0)",
        "test_credit.py test_methods.py",
    ),
    Mutant(
        "missing_reward_counts_as_zero",
        "credit/group.py",
        "known = ~torch.isnan(reward_B)",
        "known = torch.ones_like(reward_B, dtype=torch.bool); reward_B = torch.nan_to_num(reward_B)",
        "test_credit.py test_methods.py",
    ),
    Mutant(
        "evidence_without_sign",
        "credit/evidence.py",
        "torch.exp(torch.sign(advantage_N) * d_N)",
        "torch.exp(d_N)",
        "test_rlsd_facts.py test_credit.py",
    ),
    Mutant(
        "schedule_never_decays",
        "credit/schedule.py",
        "max(0.0, 1 - step / decay)",
        "1.0",
        "test_rlsd_facts.py test_methods.py",
    ),
    Mutant(
        "denominator_counts_masked_tokens",
        "loss/reduction.py",
        "reducer.sum(counted.sum())",
        "reducer.sum(torch.ones_like(counted).sum())",
        "test_methods.py test_loss.py",
    ),
    Mutant(
        "mask_ignored",
        "credit/counted.py",
        "counted = counted & batch.mask",
        "pass",
        "test_methods.py test_credit.py",
    ),
    Mutant(
        "privilege_mask_ignored",
        "credit/counted.py",
        "counted = counted & broadcast(batch.privileged, batch)",
        "pass",
        "test_methods.py test_credit.py",
    ),
    Mutant(
        "lower_clip_only",
        "loss/surrogate.py",
        "rho.clamp(low, high)",
        "rho.clamp(low, None)",
        "test_loss.py test_methods.py",
    ),
    Mutant(
        "dual_clip_on_the_wrong_sign",
        "loss/surrogate.py",
        "torch.where(advantage < 0, torch.maximum",
        "torch.where(advantage > 0, torch.maximum",
        "test_loss.py test_methods.py",
    ),
    Mutant(
        "temperature_ignored",
        "vocabulary.py",
        "return TokenDist(lambda: self._raw, self.tokens, temperature, self._raw_of)",
        "return self",
        "test_loss.py test_methods.py",
    ),
    Mutant(
        "head_gradient_of_one_chunk",
        "loss/chunked.py",
        "add_product(self.weight, grad_nV, states_nH)",
        "add_product(None, grad_nV, states_nH)",
        "test_methods.py",
    ),
    Mutant(
        "window_one_too_wide",
        "score/attention.py",
        "return seen if window is None else seen & (q - k < window)",
        "return seen if window is None else seen & (q - k <= window)",
        "test_score.py",
    ),
    Mutant(
        "student_left_in_eval_mode",
        "score/backbone.py",
        "            for module in training:\n                module.training = True",
        "            pass",
        "test_score.py",
    ),
    Mutant(
        "same_random_numbers_for_siblings",
        "rollout/engine.py",
        "{request.problem.id}/{sample}",
        "{request.problem.id}",
        "test_rollout.py",
    ),
    Mutant(
        "log_prob_before_temperature",
        "rollout/transformers_engine.py",
        "token, logp = draw(scaled, uniform)",
        "token, logp = draw(scaled, uniform); logp = torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0]",
        "test_rollout.py",
    ),
    Mutant(
        "snapshot_before_the_step",
        "optim/teachers.py",
        "if (step + 1) // int(key[1]) > last // int(key[1]):",
        "if step // int(key[1]) > last // int(key[1]):",
        "test_optim.py",
    ),
    Mutant(
        "inverted_ema_rate",
        "optim/teachers.py",
        "average[name].lerp_(live[name].to(average[name].dtype), key[1])",
        "average[name].lerp_(live[name].to(average[name].dtype), 1 - key[1])",
        "test_optim.py",
    ),
    Mutant(
        "sampler_scores_in_bfloat16",
        "rollout/cache.py",
        "torch.bmm(query.float(), key.float())",
        "torch.bmm(query.float(), key.float()).to(query.dtype)",
        "test_precision.py",
    ),
    Mutant(
        "kernel_gradient_turned_round",
        "kernels/rows.py",
        "out = tl.exp(s) - tl.exp(t)",
        "out = tl.exp(t) - tl.exp(s)",
        "test_kernels.py",
    ),
    Mutant(
        "kernel_mass_not_carried_to_a_new_maximum",
        "kernels/rows.py",
        "p_mass * p_fade + tl.sum(p_e, 0)",
        "p_mass + tl.sum(p_e, 0)",
        "test_kernels.py",
    ),
    Mutant(
        "kernel_lanes_joined_as_if_their_maxima_were_one",
        "kernels/rows.py",
        "tl.sum(p_mass * p_fade, 0)",
        "tl.sum(p_mass, 0)",
        "test_kernels.py",
    ),
    Mutant(
        "barycenters_mass_not_carried_to_a_new_maximum",
        "kernels/rows.py",
        "mass = mass * tl.exp(high - higher) + tl.sum(tl.exp(b",
        "mass = mass + tl.sum(tl.exp(b",
        "test_kernels.py",
    ),
    Mutant(
        "barycenter_of_what_was_not_raised",
        "kernels/lanes.py",
        "times(1 - share, raised(t, low)) + times(share, raised(r, low))",
        "times(1 - share, t) + times(share, r)",
        "test_kernels.py",
    ),
    Mutant(
        "barycenter_with_mass_where_all_hold_a_token_to_be_impossible",
        "kernels/cpu/rows.c",
        "s == -INFINITY && t == -INFINITY && r == -INFINITY ? -INFINITY : b",
        "b",
        "test_kernels.py",
    ),
    Mutant(
        "barycenter_of_two_sides_alone_decides_what_is_impossible",
        "loss/divergence.py",
        "dead = torch.stack([logs.detach(), *logps])",
        "dead = torch.stack([*logps])",
        "test_kernels.py",
    ),
    Mutant(
        "decoded_layer_without_the_norms_of_its_heads",
        "kernels/cpu/decoding.c",
        "rotate_turned(b->of[i] ? spare + B : from,",
        "rotate_turned(from,",
        "test_loops.py",
    ),
    Mutant(
        "decoded_layer_without_its_first_residual",
        "kernels/cpu/decoding.c",
        "o.residual = a->x,",
        "o.residual = NULL,",
        "test_loops.py",
    ),
    Mutant(
        "logits_of_a_last_panel_read_as_of_a_whole_one",
        "kernels/cpu/head.c",
        "size rows = n - first < MOST ? n - first : MOST, parts",
        "size rows = n < MOST ? n : MOST, parts",
        "test_loops.py",
    ),
    Mutant(
        "barycenters_share_is_never_taught",
        "loss/fused.py",
        " or share_n.requires_grad:",
        ":",
        "test_kernels.py",
    ),
    Mutant(
        "barycenters_sides_are_never_taught",
        "loss/fused.py",
        "if any(pair[1] not in (student, None) for pair in (to_p, to_q)):",
        "if False:",
        "test_kernels.py",
    ),
    Mutant(
        "kernel_tail_with_the_top_in_it",
        "kernels/rows.py",
        'tl.where(named == 0, z, float("-inf"))',
        "z",
        "test_kernels.py",
    ),
    Mutant(
        "tokens_of_no_group_are_never_the_top",
        "tensors.py",
        "(first[:, :, None] + index[:NEIGHBOURS]).flatten(1), left]",
        "(first[:, :, None] + index[:NEIGHBOURS]).flatten(1)]",
        "test_tensors.py",
    ),
    Mutant(
        "gathered_gradients_of_the_wrong_tokens",
        "loss/chunked.py",
        "            self._first = rows.start\n",
        "            self._first = 0\n",
        "test_kernels.py",
    ),
    Mutant(
        "heads_gradient_gathered_in_its_own_type",
        "optim/optimizer.py",
        "wide.grad = torch.zeros(wide.shape, device=wide.device)",
        "wide.grad = torch.zeros(wide.shape, device=wide.device, dtype=torch.bfloat16)",
        "test_precision.py",
    ),
    Mutant(
        "rounding_up_too_seldom",
        "optim/rounding.py",
        "random_(0, 2**_LOST, generator=random)",
        "random_(0, 2**(_LOST - 1), generator=random)",
        "test_rounding.py",
    ),
    Mutant(
        "same_draws_at_every_update",
        "optim/rounding.py",
        'f"{seed}/{update}/{name}"',
        'f"{seed}/{name}"',
        "test_rounding.py",
    ),
    Mutant(
        "draws_not_resumed",
        "optim/optimizer.py",
        'self._applied = int(state["applied"])',
        "self._applied = 0",
        "test_optim.py test_rounding.py",
    ),
    Mutant(
        "biased_pass_at_k",
        "eval/measures.py",
        "return (ways - math.comb(n - c, k)) / ways",
        "return 1 - ((n - c) / n) ** k",
        "test_eval.py",
    ),
    Mutant(
        "permutations_without_ties",
        "eval/intervals.py",
        "np.abs(differences_PM.sum(axis=0)) - EQUAL",
        "np.abs(differences_PM.sum(axis=0)) + EQUAL",
        "test_eval.py",
    ),
    Mutant(
        "random_permutations_may_give_zero",
        "eval/intervals.py",
        "(1 + int(count)) / (1 + patterns)",
        "int(count) / patterns",
        "test_eval.py",
    ),
    Mutant(
        "saved_rows_verified_again",
        "evaluate.py",
        "if (rollout.problem.id, rollout.sample) not in there]",
        "]",
        "test_eval_saved.py",
    ),
    Mutant(
        "every_part_of_a_group_the_same_samples",
        "rollout/transformers_engine.py",
        "(request, request.first + i)",
        "(request, i)",
        "test_eval_saved.py",
    ),
    Mutant(
        "evaluation_resumed_on_other_weights",
        "evaluate.py",
        'if begun.get("weights", weights) != weights:',
        "if False:",
        "test_eval_saved.py",
    ),
    Mutant(
        "base_trains_with_its_adapter",
        "score/adapter.py",
        'parameter.requires_grad_(".lora_" in name)',
        "parameter.requires_grad_(True)",
        "test_lora.py",
    ),
    Mutant(
        "narrow_adapter",
        "score/adapter.py",
        "parameter.data = parameter.data.float()",
        "parameter.data = parameter.data",
        "test_lora.py",
    ),
    Mutant(
        "external_head_is_the_students",
        "score/views.py",
        "        backbone, weights = self._of(name)\n        return backbone.head(weights)",
        "        return self.backbone.head()",
        "test_external.py",
    ),
    Mutant(
        "padded_student_rows_stay",
        "assemble.py",
        "return _probed(ground, model, run.score.layout, vllm)",
        "return _probed(replace(ground, rows=None), model, run.score.layout, vllm)",
        "test_external.py",
    ),
    Mutant(
        "teacher_changed_before_resume",
        "assemble.py",
        "if digest != self.digest:",
        "if False:",
        "test_external.py",
    ),
    Mutant(
        "tokenizers_compared_by_size",
        "score/external.py",
        "student[i] != teacher.get(i)]",
        "i not in teacher]",
        "test_external.py",
    ),
    Mutant(
        "norm_without_its_projection",
        "score/operations.py",
        "of_x.sub_(normed.mul_(along))",
        "of_x",
        "test_score.py",
    ),
    Mutant(
        "padding_token_is_taught",
        "score/operations.py",
        "if ctx.padding is not None:",
        "if False:",
        "test_score.py",
    ),
    Mutant(
        "control_teaches_all",
        "privilege/build.py",
        "return [None if index in without else carrier",
        "return [carrier",
        "test_privilege_parts.py",
    ),
    Mutant(
        "siblings_always_distinct",
        "privilege/demonstrations.py",
        "(list(dict.fromkeys(texts)) if part.distinct else texts)[:count]",
        "list(dict.fromkeys(texts))[:count]",
        "test_privilege_parts.py",
    ),
    Mutant(
        "whole_view_projected",
        "loss/chunked.py",
        "states if some is None else states[some], head)",
        "states, head) if some is None else project(states, head)[some]",
        "test_loss.py",
    ),
    Mutant(
        "teacher_without_weight_is_asked",
        "methods/sdpg.py",
        'torch.where(weighed, credit["beta"].to(logp.dtype) * pull, torch.zeros_like(pull))',
        'credit["beta"].to(logp.dtype) * pull',
        "test_method_facts.py",
    ),
    Mutant(
        "claim_by_the_mean_alone",
        "studies/graphs/claims.py",
        'one["low"] > -claim.margin',
        'one["value"] > -claim.margin',
        "test_graphs.py",
    ),
    Mutant(
        "head_gradient_twice",
        "loss/chunked.py",
        "None if self.placed else self.weight",
        "self.weight",
        "test_loss.py test_score.py",
    ),
    Mutant(
        "layer_gradient_twice",
        "score/operations.py",
        "        _add_product(parameter.grad, grad, x, fresh=False)\n",
        "        _add_product(parameter.grad, grad, x, fresh=False)\n        return grad.t() @ x\n",
        "test_score.py",
    ),
    Mutant(
        "product_of_the_first_tile_alone",
        "tensors.py",
        "for start in range(0, width, WIDE):",
        "for start in range(0, min(width, WIDE), WIDE):",
        "test_tensors.py",
    ),
    Mutant(
        "sampled_gradient_without_the_token",
        "vocabulary.py",
        "probs.mul_(-grad_n[:, None]).scatter_add_(-1, tokens_n[:, None], grad_n[:, None])",
        "probs.mul_(-grad_n[:, None])",
        "test_loss.py",
    ),
    Mutant(
        "tail_of_the_whole_vocabulary",
        "loss/by_hand.py",
        "rest = probs.scatter_(-1, top, 0.0)",
        "rest = probs",
        "test_method_facts.py",
    ),
    Mutant(
        "tail_gradient_without_its_mass",
        "loss/by_hand.py",
        "tail, per_tail, per_all = mass.log(), 1 / mass, torch",
        "tail, per_tail, per_all = mass.log(), torch.ones_like(mass), torch",
        "test_method_facts.py",
    ),
    Mutant(
        "reverse_kl_without_its_baseline",
        "loss/by_hand.py",
        "gap.sub_(value[:, None]).mul_(p_probs)",
        "gap.mul_(p_probs)",
        "test_by_hand.py",
    ),
    Mutant(
        "capped_kl_without_its_mass",
        "loss/by_hand.py",
        "q_probs.mul_(kept.sum(-1, keepdim=True)).sub_(kept)",
        "q_probs.sub_(kept)",
        "test_by_hand.py",
    ),
    Mutant(
        "a_kept_graphs_gradient_is_spent",
        "loss/by_hand.py",
        "unit * grad_n[:, None] if keeps_graph() else unit.mul_(",
        "unit.mul_(",
        "test_by_hand.py",
    ),
    Mutant(
        "an_unweighed_infinity_is_somebodys",
        "loss/by_hand.py",
        "        out[grad_n == 0] = 0.0\n",
        "        pass\n",
        "test_by_hand.py test_methods.py",
    ),
    Mutant(
        "another_prompts_rows_taken_over",
        "before.py",
        '(row["prompt"], row["reference"]) != (prompt, problem.answer)',
        'row["reference"] != problem.answer',
        "test_before.py",
    ),
    Mutant(
        "student_answers_for_the_teacher",
        "evaluate.py",
        "whose.engine if whose else engine",
        "engine",
        "test_external.py",
    ),
    Mutant(
        "pairs_drawn_with_return",
        "eval/diversity.py",
        "m * (m - 1) for m",
        "m * m for m",
        "test_diversity.py",
    ),
    Mutant(
        "vendi_of_the_bare_kernel",
        "eval/diversity.py",
        "eigvalsh(kernel_nn / kernel_nn.shape[0])",
        "eigvalsh(kernel_nn)",
        "test_diversity.py",
    ),
    Mutant(
        "text_is_its_own_reference",
        "eval/diversity.py",
        "second if holder == i else first)",
        "first)",
        "test_diversity.py",
    ),
    Mutant(
        "wrong_answers_count_as_right_ones",
        "eval/diversity.py",
        '("right", right))',
        '("right", [True] * len(mine)))',
        "test_diversity.py",
    ),
    Mutant(
        "padding_is_pooled",
        "eval/embed.py",
        "(hidden_nTH * real_nT1).sum(1) / real_nT1.sum(1).clamp_min(1)",
        "hidden_nTH.mean(1)",
        "test_diversity.py",
    ),
    Mutant(
        "answer_is_evidence",
        "eval/leakage.py",
        "[word & ~answer].sum()",
        "[word].sum()",
        "test_leakage.py",
    ),
    Mutant(
        "form_is_evidence",
        "eval/leakage.py",
        "[word & ~answer].sum()",
        "[~answer].sum()",
        "test_leakage.py",
    ),
    Mutant(
        "flagged_by_the_interval_alone",
        "eval/leakage.py",
        ' and found["p"] <= SIGNIFICANT',
        "",
        "test_leakage.py",
    ),
    Mutant(
        "drift_is_information",
        "eval/leakage.py",
        'STUDENT if config.teacher == "live" else REFERENCE',
        "STUDENT",
        "test_leakage.py",
    ),
    Mutant(
        "prompts_own_hint_is_a_leak",
        "eval/leakage.py",
        "in compiled if not pattern.search(prompt)]",
        "in compiled]",
        "test_leakage.py",
    ),
    Mutant(
        "copied_from_the_prompt",
        "eval/copies.py",
        "copied > seen and copied",
        "copied",
        "test_leakage.py",
    ),
    Mutant(
        "delong_mixes_its_sides",
        "eval/auroc.py",
        "across_n.var(ddof=1) / n",
        "across_n.var(ddof=1) / m",
        "test_leakage.py",
    ),
    Mutant(
        "reference_learns_too",
        "leakage.py",
        'Teachers({REFERENCE: View("initial")}, parts.backbone.model).weights(REFERENCE)',
        "None",
        "test_leakage_runs.py",
    ),
    Mutant(
        "student_is_its_own_reference",
        "leakage.py",
        'REFERENCE: View(first, "plain")',
        'REFERENCE: View("live", "plain")',
        "test_leakage_runs.py",
    ),
    Mutant(
        "one_problem_for_both_controls",
        "leakage.py",
        'EVALUATION - (arm == "other_problem")',
        "EVALUATION",
        "test_leakage_runs.py",
    ),
    Mutant(
        "missing_privilege_is_scored",
        "leakage.py",
        "if name not in prompts or prompts[name][i]}",
        "}",
        "test_leakage_runs.py",
    ),
    Mutant(
        "completions_scored_at_another_temperature",
        "learned.py",
        "temperature=temperature_of(rollouts)",
        "temperature=1.0",
        "test_leakage_runs.py",
    ),
    Mutant(
        "planted_shares_not_nested",
        "studies/planted.py",
        'random.Random(f"{seed}/order")',
        'random.Random(f"{seed}/{share}")',
        "test_study_leakage.py",
    ),
    Mutant(
        "silent_teacher_unnoticed",
        "report/health.py",
        'metrics.get("teacher/gap_abs", 1.0) < SILENT_TEACHER',
        'metrics.get("teacher/gap_abs", 1.0) < 0',
        "test_train.py",
    ),
    Mutant(
        "cut_responses_unnoticed",
        "report/health.py",
        'metrics.get("completions/clipped_ratio", 0.0) >= 0.5',
        'metrics.get("completions/clipped_ratio", 0.0) > 1.0',
        "test_practice.py",
    ),
    Mutant(
        "damaged_checkpoint_believed",
        "optim/checkpoints.py",
        'if _crc32(folder / name) != seal["crc32"]:',
        "if False:",
        "test_checkpoint.py",
    ),
    Mutant(
        "responses_shared_across_prompts",
        "tensors.py",
        "        places: dict[tuple[int, ...], int] = {}\n        for index in indices:",
        "        places = {} if not groups else places\n        for index in indices:",
        "test_tensors.py",
    ),
    Mutant(
        "published_default_changed",
        "methods/sdpo.py",
        "top_k: int | None = 100",
        "top_k: int | None = 64",
        "test_defaults.py",
    ),
    Mutant(
        "infinite_gap_let_through",
        "methods/opd.py",
        "torch.where(gap.isinf(), gap.sign() * MAX_LOG_RATIO, gap)",
        "gap",
        "test_methods.py",
    ),
    Mutant(
        "missing_answer_is_a_lost_vote",
        "eval/measures.py",
        'values["distinct_answers"] = math.nan if silent else',
        'values["distinct_answers"] = math.nan if not rows else',
        "test_eval.py",
    ),
    Mutant(
        "vllm_begins_with_its_own_weights",
        "rollout/vllm_engine.py",
        "        if first:",
        "        if False:",
        "test_vllm.py",
    ),
    Mutant(
        "vllm_keeps_what_old_weights_computed",
        "rollout/vllm_server.py",
        'if not self._checked("POST", "/reset_prefix_cache").get("success"):',
        "if False:",
        "test_vllm.py",
    ),
    Mutant(
        "vllm_weights_of_anybody",
        "rollout/vllm_engine.py",
        "if answer.stamps != {self._stamp}:",
        "if False:",
        "test_vllm.py",
    ),
    Mutant(
        "vllm_samples_at_temperature_one",
        "rollout/vllm_engine.py",
        '"temperature": sampling.temperature,',
        '"temperature": 1.0,',
        "test_vllm.py",
    ),
    Mutant(
        "vllm_keeps_a_tied_head",
        "rollout/vllm_worker.py",
        'if hasattr(module, "cpu_linear") and',
        "if False and",
        "test_vllm.py",
    ),
    Mutant(
        "rollouts_of_old_weights",
        "batches.py",
        "- {step}:",
        "- {step, step - 1}:",
        "test_vllm.py",
    ),
    Mutant(
        "adapter_merged_unscaled",
        "score/export.py",
        'module.get_delta_weight("default").float()',
        'module.get_delta_weight("default").float() / module.scaling["default"]',
        "test_vllm.py",
    ),
    Mutant(
        "loop_of_norms_without_the_projection",
        "kernels/cpu/layers.c",
        "(g[h] * w[h] - row[h] * back) * root[i]",
        "g[h] * w[h] * root[i]",
        "test_loops.py",
    ),
    Mutant(
        "loop_sees_beyond_the_window",
        "kernels/cpu/decoding.c",
        "sight = length + end - a->window;",
        "sight = length + end - a->window - 1;",
        "test_loops.py",
    ),
    Mutant(
        "prompt_learns_from_its_last_part_alone",
        "kernels/cpu/attention.c",
        "p->of_key[to + d] += before[at * D + d]",
        "p->of_key[to + d] = before[at * D + d]",
        "test_loops.py",
    ),
    Mutant(
        "loop_forgets_the_impossible_token",
        "kernels/cpu/rows.c",
        "return e == 0.0f ? 0.0f : e * x;",
        "return e * x;",
        "test_kernels.py",
    ),
    Mutant(
        "loops_that_count_wrong_are_used",
        "kernels/loops.py",
        "            probe.check()\n",
        "",
        "test_loops.py",
    ),
    Mutant(
        "loops_of_another_processor",
        "kernels/compiled.py",
        "*linked, kind(), *sources]",
        "*linked, *sources]",
        "test_loops.py",
    ),
    Mutant(
        "separate_layers_have_other_bits",
        "score/fused.py",
        "run(Gate, module.gate_proj(x), module.up_proj(x))",
        "silu(module.gate_proj(x)) * module.up_proj(x)",
        "test_lora.py",
    ),
    Mutant(
        "prompts_left_on_the_cpu",
        "score/views.py",
        "[batch.responses[i] for i in there], str(backbone.device))",
        "[batch.responses[i] for i in there], \"cpu\")",
        "test_device.py",
    ),
    Mutant(
        "random_numbers_left_on_the_cpu",
        "rollout/transformers_engine.py",
        "dtype=torch.float64, device=logits.device)",
        "dtype=torch.float64)",
        "test_device.py",
    ),
    Mutant(
        "moments_left_on_the_cpu",
        "optim/optimizer.py",
        '.to(parameter.device, copy=True)',
        '.to("cpu", copy=True)',
        "test_device.py",
    ),
    Mutant(
        "run_folder_is_no_recipe",
        "recipe.py",
        '({"out": str(_named(recipe))} if of_run else {})',
        "{}",
        "test_cli.py test_resume.py",
    ),
    Mutant(
        "key_twice",
        "recipe.py",
        "if first.setdefault((key.tag, key.value), key) is not key:",
        "if first.setdefault((key.tag, key.value), key) is None:",
        "test_bad_input.py",
    ),
    Mutant(
        "cut_library_loaded",
        "kernels/compiled.py",
        "if not _is_whole(folder / name):",
        "if not (folder / name).exists():",
        "test_loops.py",
    ),
    Mutant(
        "empty_folder_left",
        "train.py",
        "        stack.callback(place.folder.leave)\n",
        "",
        "test_bad_input.py",
    ),
    Mutant(
        "layer_forgets_its_residual_gradient",
        "score/layers.py",
        "x, norm, kept.root, of_middle)",
        "x, norm, kept.root)",
        "test_layers.py",
    ),
    Mutant(
        "layer_turns_its_keys_gradient_forwards",
        "score/layers.py",
        "loops.rotate(of_k, cos, sin, back=True, inplace=True)",
        "loops.rotate(of_k, cos, sin, inplace=True)",
        "test_layers.py",
    ),
    Mutant(
        "layer_under_a_hook",
        "score/layers.py",
        "and not is_looked_at(self._modules[1:])",
        "and True",
        "test_layers.py",
    ),
    Mutant(
        "layer_that_should_be_recomputed",
        "score/layers.py",
        "and not any(part.training for part in self._modules)",
        "and True",
        "test_layers.py",
    ),
    Mutant(
        "layer_of_sixteen_bits",
        "score/layers.py",
        'and not torch.is_autocast_enabled("cpu")',
        "and True",
        "test_layers.py",
    ),
    Mutant(
        "layer_whose_parts_are_others",
        "score/layers.py",
        "return list(self._module.modules()) == self._modules and",
        "return",
        "test_layers.py",
    ),
    Mutant(
        "layer_of_another_class",
        "score/layers.py",
        "and all(type(part) is nn.Linear and part.bias is None for part in self._parts[2:])",
        "and True",
        "test_layers.py",
    ),
    Mutant(
        "layer_under_a_window",
        "score/layers.py",
        "and segments.sees_all(self.attends[2])",
        "and True",
        "test_layers.py",
    ),
    Mutant(
        "gradients_of_a_row_that_has_none_are_added",
        "score/operations.py",
        "_add_product(row.whole, grad, x, not row.adds)",
        "_add_product(row.whole, grad, x, False)",
        "test_layers.py",
    ),
    Mutant(
        "gradients_of_a_row_whose_hooks_are_not_told",
        "score/operations.py",
        "not parameter.is_leaf or parameter._backward_hooks",
        "not parameter.is_leaf",
        "test_layers.py",
    ),
    Mutant(
        "together_though_there_is_a_gap",
        "heap.py",
        "                and x.data_ptr() == at):",
        "                ):",
        "test_layers.py",
    ),
    Mutant(
        "patched_layer_is_replaced",
        "score/fused.py",
        'for module, forward in new if "forward" not in vars(module)}',
        "for module, forward in new}",
        "test_layers.py",
    ),
    Mutant(
        "distance_of_a_whole_embedding",
        "optim/teachers.py",
        "    return tensor.flatten().split(PIECE)",
        "    return [tensor.flatten()]",
        "test_optim.py",
    ),
    Mutant(
        "chain_looks_at_no_number",
        "score/turned.py",
        "tables is angles and hidden.equal(numbers)",
        "tables is angles",
        "test_chain.py",
    ),
    Mutant(
        "chain_looks_at_no_angles",
        "score/turned.py",
        "hidden is before and tables is angles and",
        "hidden is before and",
        "test_chain.py",
    ),
    Mutant(
        "chain_keeps_the_weights_of_its_first_step",
        "score/turned.py",
        "segments.moves, *(at for layer in self._layers for at in layer.weights())",
        "segments.moves",
        "test_chain.py",
    ),
    Mutant(
        "chain_reads_where_keys_were",
        "score/turned.py",
        "of = segments, segments.moves, *(",
        "of = segments, *(",
        "test_chain.py",
    ),
    Mutant(
        "chain_under_a_hook",
        "score/turned.py",
        "if is_looked_at([layer.module for layer in self._layers]) or not isinstance",
        "if not isinstance",
        "test_chain.py",
    ),
    Mutant(
        "chain_outlives_the_decoding",
        "score/turned.py",
        "self._made = self._passed = self._stack = None\n        self._of",
        "self._stack = None\n        self._of",
        "test_chain.py",
    ),
    Mutant(
        "chain_of_layers_that_are_gone",
        "score/turned.py",
        'if module in parts and vars(module)',
        'if vars(module)',
        "test_chain.py",
    ),
    Mutant(
        "softmax_of_what_stands_before_a_window",
        "kernels/cpu/common.h",
        "for (size i = start; i < from; i++) x[i] = -INFINITY;",
        "",
        "test_loops.py test_chain.py",
    ),
    Mutant(
        "stripes_first_query_sees_one_key_less",
        "kernels/cpu/attention.c",
        "per_out, QUERIES, keys - rows + i + QUERIES, D);",
        "per_out, QUERIES, keys - rows + i + QUERIES - 1, D);",
        "test_loops.py test_layers.py",
    ),
    Mutant(
        "key_forgets_the_last_query_that_sees_it",
        "kernels/cpu/attention.c",
        "D, QUERIES, rows - i, D);",
        "D, QUERIES, rows - i - 1, D);",
        "test_loops.py test_layers.py",
    ),
    Mutant(
        "norm_of_a_sum_forgets_what_is_added",
        "kernels/cpu/layers.c",
        "row[h] += added[i * H + h];",
        "row[h] += 0 * added[i * H + h];",
        "test_loops.py test_layers.py",
    ),
    Mutant(
        "layer_in_one_call_forgets_its_residual_gradient",
        "kernels/cpu/passes.c",
        "norm_back(p, inner, p->x, p->norm, p->root, of_middle, p->of_x,",
        "norm_back(p, inner, p->x, p->norm, p->root, NULL, p->of_x,",
        "test_loops.py test_layers.py",
    ),
    Mutant(
        "layer_in_one_call_forgets_the_gradients_before",
        "kernels/passes.py",
        "given.adds = (ctypes.c_int * 4)(*(adds for _, adds in into))",
        "given.adds = (ctypes.c_int * 4)()",
        "test_loops.py test_layers.py",
    ),
    Mutant(
        "layer_in_one_call_records_nothing",
        "score/layers.py",
        "x.shape[0] > FEW and type(segments).attend is Segments.attend)",
        "x.shape[0] > FEW)",
        "test_layers.py",
    ),
    Mutant(
        "gradients_of_a_layer_in_one_call_are_nobodys",
        "score/layers.py",
        """            for row in rows:
                row.written()
""",
        "",
        "test_layers.py",
    ),
    Mutant(
        "memory_of_a_tensor_that_is_held_is_taken_again",
        "heap.py",
        "if count == _idle and",
        "if",
        "test_heap.py",
    ),
]


def caught(mutant: Mutant, folder: Path) -> str:
    """The first test that fails with this fault planted in the copy; "" where none does."""
    path = folder / "selftaught" / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: the text to change stands in {mutant.file} {source.count(mutant.old)} times")
    path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        done = run_tests(mutant.tests, folder)
    finally:
        path.write_text(source, encoding="utf-8")
    if done.returncode < 0:  # ended by a signal: a fault that reads or writes what is no longer there
        return f"a crash (signal {-done.returncode})"
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?tests/(\S+)", done.stdout, re.MULTILINE)
    return (failed or ["a test"])[0] if done.returncode == 1 else ""


def run_tests(tests: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The tests on the copy in `folder`: it comes first on the path, so that the installed package does not count."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               *(str(ROOT / "tests" / test) for test in tests.split())]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True,
                          text=True, check=False)


def refuse_failing(tests: str, folder: Path) -> None:
    """End where these tests fail without any fault: they would seem to catch everything."""
    done = run_tests(tests, folder)
    if done.returncode != 0:
        raise SystemExit(f"{tests}: fails on the code as it is, so it says nothing of faults; mend that first\n"
                         f"{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(ROOT / "src" / "selftaught", folder / "selftaught")
        for tests in dict.fromkeys(tests for mutant in chosen for tests in mutant.tests.split()):
            refuse_failing(tests, folder)
        for mutant in chosen:
            began = time.monotonic()
            found = caught(mutant, folder)
            said = f"caught  {mutant.name}  by {found}" if found else f"MISSED  {mutant.name}"
            print(f"{said}  ({time.monotonic() - began:.0f} s)", flush=True)
            if not found:
                missed.append(mutant.name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults were caught")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
