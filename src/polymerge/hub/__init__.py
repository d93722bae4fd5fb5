"""A bundle on the model hub.

card.py     the model card, made from the manifest
licences.py under which licence a source stands
push.py     the bundle's files and the card in one commit
"""

from .push import Pushed, push_bundle

__all__ = ["Pushed", "push_bundle"]
