"""The steps of finetune, calibrate and export, for any task.

The functions of these names are public as ``deploykit.finetune`` and ``deploykit.export``, which no subpackage may
have as its name.
"""
