"""`embeddings.create` of the official `openai` client, unchanged, against `shoal serve`: prints what it got as JSON."""

import json
import math
import sys

import openai

url, key = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
model = client.models.list().data[0].id
texts = [
    "Once upon a time there was a little fox who lived in the wood.",
    "Once upon a time there was a little fox who lived in a wood",
    "1 2 3 4",
]


def product(a, b):
    return sum(x * y for x, y in zip(a, b))


whole = client.embeddings.create(model=model, input=texts)
vectors = [item.embedding for item in whole.data]
plain = client.embeddings.create(model=model, input=texts[1], encoding_format="float")
again = client.embeddings.create(model=model, input=texts[:1])
got = {
    "count": len(vectors),
    "width": len(vectors[0]),
    "indices": [item.index for item in whole.data],
    "length": math.sqrt(product(vectors[0], vectors[0])),
    "near": product(vectors[0], vectors[1]),
    "far": product(vectors[0], vectors[2]),
    "same": all(abs(a - b) < 1e-6 for a, b in zip(plain.data[0].embedding, vectors[1])),
    "again": again.data[0].embedding == vectors[0],
    "tokens": whole.usage.prompt_tokens,
    "route": len(whole.model_extra["x_shoal"]["route"]),
}
try:
    client.embeddings.create(model=model, input=texts[0], dimensions=64)
except openai.BadRequestError as error:
    got["dimensions"] = [error.status_code, error.param]
print(json.dumps(got))
