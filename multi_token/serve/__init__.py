"""Serve a trained run over HTTP: many concurrent requests, untrusted clients.

    HTTP -> openai/ (messages) -> media/ (decode in worker processes) -> media_embeddings
         -> engines/ (local, or vLLM servers) -> detokenizer -> openai/ (JSON, SSE)

`service.py` connects the steps, `server.py` runs uvicorn and drains, `chat_ui/` is the chat page.
No code here trains or loads checkpoints.
"""
