"""A classifier as a model of Triton's Python backend, as people write it: transformers inside ``execute``.

The requests of a dynamic batch become one padded batch; its config.pbtxt is in classification_serving.py.
"""

import json

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class TritonPythonModel:
    def initialize(self, args):
        checkpoint = json.loads(args["model_config"])["parameters"]["checkpoint"]["string_value"]
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()

    def execute(self, requests):
        texts, counts = [], []
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().ravel()
            texts += [row.decode() for row in rows]
            counts.append(len(rows))
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            scores = self.model(**batch).logits.softmax(-1).numpy()
        labels = np.array([self.model.config.id2label[i].encode() for i in scores.argmax(-1)], dtype=object)
        responses, start = [], 0
        for count in counts:
            rows = slice(start, start + count)
            label = pb_utils.Tensor("LABEL", labels[rows].reshape(-1, 1))
            responses.append(pb_utils.InferenceResponse([label, pb_utils.Tensor("SCORES", scores[rows])]))
            start += count
        return responses
