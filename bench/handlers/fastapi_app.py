"""A classifier behind FastAPI and transformers, in plain use: each request calls the pipeline.

Run: ``CHECKPOINT=folder uvicorn fastapi_app:app``. The route and its JSON are those of KServe v2, so that one load
generator can measure all servers.
"""

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

app = FastAPI()
classify = pipeline("text-classification", model=os.environ["CHECKPOINT"], device="cpu")


class Tensor(BaseModel):
    name: str
    data: list[str]


class Request(BaseModel):
    inputs: list[Tensor]


@app.post("/v2/models/model/infer")
def infer(request: Request) -> dict[str, Any]:
    answers = classify(request.inputs[0].data, truncation=True)
    return {
        "outputs": [
            {"name": "LABEL", "data": [answer["label"] for answer in answers]},
            {"name": "SCORES", "data": [answer["score"] for answer in answers]},
        ]
    }
