"""Regressors for synthetic heads: landmarks, pose, actions and identity from pictures, learnt from the heads' truth.

On synthetic heads the evaluation's extractors can be trained on the very generator that draws the heads, and their
error can be measured against the truth. `python -m dagan_rt.evaluation.heads train` makes the files of
train/extractors, `validate` measures them on identities kept for measuring.
"""
