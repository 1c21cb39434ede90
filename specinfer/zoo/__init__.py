"""The bundled pair as package data: `zoo:parley`, and its drafter `zoo:parley-draft`.

Each folder is an ordinary Hugging Face checkpoint with its card; LICENSE here covers both.
"""
