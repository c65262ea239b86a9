"""OpenAI-compatible server: a trained run for many clients at once.

    HTTP request -> openai/: schema, messages -> Conversation
                 -> media/: worker processes decode untrusted bytes -> Prepared
                 -> media_embeddings: encode + project, micro-batched and cached
                 -> engines/: prompt -> tokens (local, or vLLM servers)
                 -> detokenizer: token ids -> text, stop strings
                 -> openai/: SSE events or one JSON response

`service` joins the steps, `admission` bounds the requests in them, `server` runs uvicorn. This
package never reads a path or opens a socket named by a client; `media.fetch` does, under limits.
"""
