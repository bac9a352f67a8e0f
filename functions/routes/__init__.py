"""One router per resource, named as its URL."""

MODEL_PATHS = frozenset({"/chat/completions", "/completions", "/embeddings", "/generate", "/rr-chat/stream"})
