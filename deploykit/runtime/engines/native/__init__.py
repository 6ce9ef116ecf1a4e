"""deploykit's own engine: INT8 classifiers and translators on CPUs. Its C is in ``csrc/``.

``loader`` finds the library and chooses the instruction set, ``weights`` maps files of weights, ``classifier`` and
``translator`` run models.
"""
