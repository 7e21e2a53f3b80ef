"""What all pages share: their templates, and pictures inside of them."""

import base64
import io
from pathlib import Path

from PIL import Image

TEMPLATES = Path(__file__).with_name("templates")


def as_data_uri(image: Image.Image) -> str:
    """A picture as a JPEG that stands in the page itself."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
