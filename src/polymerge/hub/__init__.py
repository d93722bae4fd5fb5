"""A bundle on the model hub.

card.py     the model card, made from the manifest
licences.py under which licence a source stands
pull.py     a bundle from the hub, whole
push.py     the bundle's files and the card in one commit
"""

from .pull import pull_bundle
from .push import Pushed, push_bundle

__all__ = ["Pushed", "pull_bundle", "push_bundle"]
