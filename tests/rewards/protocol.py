"""Rewards in the forms that users write them."""

import asyncio


def subset(completions, answer):
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


_loop = []


async def later(completions, **_):
    _loop.append(asyncio.get_running_loop())
    await asyncio.sleep(0.001)
    assert _loop[0] is asyncio.get_running_loop()  # clients that live between calls are bound to it
    return [None if not completion else len(completion) / 10 for completion in completions]


def whole(completions, bonus=0.0, **_):
    return [len(completions) + bonus] * len(completions)


def needs(completions, difficulty):
    return [1.0]


def no_completions(prompts, answers):
    return [1.0]


def breaks(completions, **_):
    return [1 / 0]


def picture(completions, image):
    return [1.0]


not_a_function = 3
