"""The supplementary's Table 1 in miniature: its four methods trained and measured alike, with intervals.

`python -m dagan_rt.evaluation.comparison --out OUT` does all of it and continues where it was stopped.
"""
