"""One-line errors: of damaged files, and of the Hub's client."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

_LOG_IN = "run `hf auth login`, or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"


def one_line(error: BaseException | str) -> str:
    """Return an error message as one printable line of at most 300 characters. It may quote a damaged file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300])


@contextmanager
def hub_errors() -> Iterator[None]:
    """Re-raise exceptions of the Hub's client as a one-line RuntimeError, with a hint if a token is needed.

    Raises:
        RuntimeError: For every exception.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise RuntimeError(f"no token for the Hub: {_LOG_IN}") from error
    except OfflineModeIsEnabled as error:
        raise RuntimeError("HF_HUB_OFFLINE is set, and this needs the Hub: unset it") from error
    except HfHubHTTPError as error:
        response = getattr(error, "response", None)
        way_out = f"; {_LOG_IN}" if getattr(response, "status_code", None) in (401, 403) else ""
        raise RuntimeError(f"{one_line(error).rstrip('.')}{way_out}") from error
    except Exception as error:  # the client's HTTP library depends on its version
        raise RuntimeError(f"cannot use {constants.ENDPOINT}: {one_line(error)}") from error
