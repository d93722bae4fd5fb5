"""A bundle behind the OpenAI API.

app.py          create_app: the application
settings.py     every limit, and the keys
access.py       who may ask, before every route
schema.py       requests
shapes.py       answers
routing.py      which expert answers
service.py      from requests to answers
answers.py      ... across threads
completions.py  /v1/chat/completions, /v1/completions
models.py       /v1/models
judgements.py   /v1/embeddings, /v1/route
status.py       /health, /ready, /metrics
stages.py       the model `staged`
playground.py   the page at /
metrics.py      what is counted
errors.py       errors in OpenAI's shape
probe.py        every expert is checked before the server starts
run.py          loading, serving, ending
"""
