"""The page of `dagan-rt demo`: a run with everything that happens inside it, in a browser on this machine.

runs.py      a portrait and a clip, or a camera's frames, to states that can be shown; knows nothing of the web
line.py      one run at a time, in the order of arrival
markup.py    a state as HTML
layout.py    what stands where, and which button does what (Gradio)
door.py      what a browser may ask the server for
server.py    all of it on an address
"""
