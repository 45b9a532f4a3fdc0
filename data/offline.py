"""Without a network the Hugging Face libraries try again for half a minute: here they are told at once."""
import os
import socket
import sys
from urllib.parse import urlsplit


def offline_without_network():
    """Where the hub's name cannot be looked up, its libraries answer from their cache alone from here on."""
    if any(name.lower() in ('https_proxy', 'all_proxy') for name in os.environ):
        return                                      # which looks names up itself
    host = urlsplit(os.environ.get('HF_ENDPOINT', 'https://huggingface.co')).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        for name in ('huggingface_hub.constants', 'datasets.config'):
            if name in sys.modules:                 # the second takes seconds to import, for data sets alone
                sys.modules[name].HF_HUB_OFFLINE = True
