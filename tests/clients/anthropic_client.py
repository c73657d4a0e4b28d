"""The official `anthropic` client, unchanged, against `shoal serve`: prints what it got as JSON."""

import json
import sys

import anthropic

url, key, question = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
messages = [{"role": "user", "content": question}]
ask = {"model": "demo", "max_tokens": 30, "messages": messages, "system": "Be brief."}
# This client has no word for it any more; other programs send it.
greedy = {"temperature": 0}
whole = client.messages.create(**ask, extra_body=greedy)
with client.messages.stream(**ask, extra_body=greedy) as stream:
    streamed = "".join(stream.text_stream)
    final = stream.get_final_message()
try:
    client.messages.create(**{**ask, "model": "gpt-9"})
    status = None
except anthropic.NotFoundError as error:
    status = error.status_code
print(
    json.dumps(
        {
            "text": whole.content[0].text,
            "tokens": whole.usage.output_tokens,
            "streamed": streamed,
            "stream_tokens": final.usage.output_tokens,
            "stop": final.stop_reason,
            "counted": client.messages.count_tokens(
                model="demo", messages=messages, system="Be brief."
            ).input_tokens,
            "input_tokens": whole.usage.input_tokens + whole.usage.cache_read_input_tokens,
            "unknown": status,
        }
    )
)
