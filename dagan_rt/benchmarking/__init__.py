"""Measurements that people can repeat: results are checked first, then timed, and kept with what they were made on.

`suites` says what to run, `operations` and `peers` what that is, `devices` how it is timed, `kernels` puts them
together, `rows` keeps what came out and compares it, `printing` shows it. `python -m dagan_rt.benchmarking` is the
command.
"""
