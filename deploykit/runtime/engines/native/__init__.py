"""deploykit's own engine for INT8 encoders and translators on CPUs. Its C code is in ``csrc/``.

``loader`` finds the library and chooses the instruction set, ``weights`` maps weight files, ``encoder`` and
``translator`` run models.
"""
