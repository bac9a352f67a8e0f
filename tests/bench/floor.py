"""The least that a gateway on this stack can cost: FastAPI and httpx pass the bytes on; no keys, limits or records."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

UPSTREAM = os.environ["OPENAI_BASE_URL"]
HEADERS = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "content-type": "application/json"}

app = FastAPI()
client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=30)


@app.get("/health")
async def health() -> PlainTextResponse:
    return PlainTextResponse("ok")


@app.post("/v1/chat/completions", response_model=None)
async def chat(request: Request) -> Response:
    body = await request.body()
    asked = client.build_request("POST", f"{UPSTREAM}/chat/completions", content=body, headers=HEADERS)
    answer = await client.send(asked, stream=True)
    if answer.headers["content-type"].startswith("text/event-stream"):
        return StreamingResponse(relay(answer), media_type="text/event-stream")
    try:
        await answer.aread()
        return JSONResponse(answer.json(), answer.status_code)
    finally:
        await answer.aclose()


async def relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


if __name__ == "__main__":
    host, port = os.environ["HOST"], int(os.environ["PORT"])
    uvicorn.run(app, host=host, port=port, http="httptools", log_level="warning", access_log=False)
