"""A classifier as a model of Triton's Python backend, in plain use: tokenizers and ONNX Runtime inside ``execute``.

The requests of a dynamic batch become one padded batch. Its config.pbtxt is in classification_serving.py. (transformers
instead would need the interpreter's own libpython; the stub uses the system's, whose ssl module may not load.)
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        export = Path(parameters["export"]["string_value"])
        self.labels = np.array(
            [label.encode() for label in json.loads(parameters["labels"]["string_value"])], dtype=object
        )
        self.tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
        self.tokenizer.enable_truncation(int(parameters["max_length"]["string_value"]))
        self.tokenizer.enable_padding()
        self.session = onnxruntime.InferenceSession(str(export / "model.onnx"), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        texts, counts = [], []
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().ravel()
            texts += [row.decode() for row in rows]
            counts.append(len(rows))
        encodings = self.tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        }
        logits = self.session.run(None, inputs)[0]
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        labels = self.labels[scores.argmax(-1)]
        responses, start = [], 0
        for count in counts:
            rows = slice(start, start + count)
            label = pb_utils.Tensor("LABEL", labels[rows].reshape(-1, 1))
            responses.append(pb_utils.InferenceResponse([label, pb_utils.Tensor("SCORES", scores[rows])]))
            start += count
        return responses
