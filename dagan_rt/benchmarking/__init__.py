"""Measurements that people can repeat: results are checked first, then timed, and kept with what they were made on.

suites.py, subjects.py              what to run, and on which networks and faces
kernels.py                          the CUDA kernels (operations.py, peers.py), timed by devices.py
frames.py, frame_peers.py           whole frames by every backend and by PyTorch; isolated.py: torch.compile
stages.py, floors.py                the stages of a frame, and what each must do at least
streams.py                          many sessions at their own pace, or one for very long
training.py, training_runs.py       steps of a training and their parts (clock.py); which forms of which recipes
cpu.py                              engines and precisions on CPUs
rows.py, printing.py, html.py       what came out: kept and compared, as text, as a page with pictures
command.py                          `dagan-rt bench` and `python -m dagan_rt.benchmarking`
"""
