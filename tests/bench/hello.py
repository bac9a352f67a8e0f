"""What a cold start is measured against: FastAPI's hello world behind Mangum with a boto3 client, in the least loop."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
from typing import Any

import boto3
from fastapi import FastAPI
from mangum import Mangum

asyncio.set_event_loop(asyncio.new_event_loop())
app = FastAPI()
table = boto3.client("dynamodb")
handler = Mangum(app, lifespan="off")


@app.get("/health")
async def health() -> dict[str, Any]:
    return {"status": "ok"}


def main() -> None:
    """https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html"""
    connection = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
    while True:
        connection.request("GET", "/2018-06-01/runtime/invocation/next")
        reply = connection.getresponse()
        event, request_id = json.loads(reply.read()), reply.headers["Lambda-Runtime-Aws-Request-Id"]
        body = json.dumps(handler(event, None)).encode()
        connection.request("POST", f"/2018-06-01/runtime/invocation/{request_id}/response", body)
        connection.getresponse().read()


if __name__ == "__main__":
    main()
