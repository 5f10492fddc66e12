"""The networks as the kernels run them: batch norms folded, buffers fixed, every step one launch.

    tools.py       where maps live, which weights are packed, which configuration each convolution runs in
    networks.py    depth, key points, motion and decoder: the order of launches, and nothing else
    frame.py       a whole driving frame, uint8 in and uint8 out
    tuning.py      times the configurations of the convolutions on the GPU at hand

The same code runs on the CPU through the kernels' PyTorch twins (`Tools(reference=True)`), where tests compare it with
`dagan_rt.networks`. PyTorch is needed for memory and for the trained weights; what runs are kernels alone.
"""
