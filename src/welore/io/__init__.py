"""Bytes on disk and work on this machine: atomic files, safetensors, checkpoints, the hub, threads, restarts.

Import `RunContext` from context, `resolve_model` from hub, `Workspace` from resume, the rest from the file of its name;
`_malloc` is the command line's.
"""
