"""English word lists of the leakage measures: what mentions an unseen reference, and which words are style.

A recipe's `eval.leakage.mentions` and `style_words` take their place.
"""

from __future__ import annotations

# What a response says when it speaks of something beside its question. Matched without regard to case, and only where
# the prompt itself does not match. "The correct answer is" is not among them: who has worked it out says so too.
MENTIONS = (
    r"\b(?:the|this|that|your|given|provided|a) hints?\b",
    r"\b(?:reference|given|provided|supplied|model|official|sample|expert|stated) (?:solutions?|answers?|results?)\b",
    r"\b(?:answer|solution) key\b",
    r"\bas (?:was |is |already )?(?:given|stated|shown|provided|told|mentioned|noted)\b",
    r"\baccording to the (?:hint|reference|solution|answer|key|feedback|demonstration|example)\b",
    r"\b(?:we|i|you) (?:are|were|was|have been) (?:given|told|shown) (?:that |the )*(?:answer|result|solution|it)\b",
    r"\b(?:previous|earlier|failed) (?:attempt|try|solution)\b",
    r"\b(?:the|this) (?:feedback|demonstration)\b",
)

# Words that serve any text: articles, pronouns, auxiliaries, prepositions, conjunctions, connectives, fillers.
STYLE_WORDS = frozenset(
    word
    for line in (
        "a an the this that these those it its i we you he she they me us them my our your his her their",
        "is are was were be been being am do does did have has had will would can could shall should may might must",
        "of to in on at by for from with as into over under about between through and or but nor so yet if then than",
        "because since while when where which who whom whose what how why not no yes",
        "let let's us now next first second third finally also therefore thus hence however wait okay ok well hmm",
        "just really very here there again both each all any some",
    )
    for word in line.split()
)
