"""Packed sequences as one HTML page: tokens coloured by their mask, borders of documents, media.

Written with the standard library alone; the page needs no other file and no network.
"""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile

from PIL import Image

from k25_train.data.overview.shown import ShownDocument, ShownImage, ShownSequence, ShownToken

LARGEST_SIDE_PX = 640
"""Of a picture in the page; larger ones are scaled down for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTop:
    """What a page says before its sequences."""

    title: str
    facts: Mapping[str, str]
    """What was drawn: name -> value."""
    shares: Mapping[str, float]
    """Source -> its share of the tokens of the batch."""


def page(top: PageTop, sequences: Sequence[ShownSequence], seq_len: int) -> str:
    """The whole page."""
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    body = "".join(_sequence(number, sequence, seq_len) for number, sequence in enumerate(sequences, start=1))
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in top.facts.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(top.title)}</title>'
        f"<style>{style}</style></head><body><h1>{_text(top.title)}</h1><dl>{facts}</dl>{_shares(top.shares)}"
        f"{_LEGEND}<main>{body}</main></body></html>\n"
    )


_LEGEND = (
    '<p class="legend"><label><input type="checkbox" id="dim"> dim what has no loss</label> '
    '<span class="t">has a loss</span> <span class="n">has none</span> <span class="s">special</span> '
    '<span class="p">padding</span></p>'
)


def _shares(shares: Mapping[str, float]) -> str:
    """A bar of the sources' shares in the batch."""
    parts = "".join(
        f'<span class="c{number % 8}" style="flex:{share:.6f}" title="{_text(name)} {100 * share:.2f}%">'
        f"{_text(name)} {100 * share:.1f}%</span>"
        for number, (name, share) in enumerate(shares.items())
    )
    return f'<div class="bar shares">{parts}</div>'


def _sequence(number: int, sequence: ShownSequence, seq_len: int) -> str:
    documents = "".join(_document(n, each) for n, each in enumerate(sequence.documents))
    bar = "".join(
        f'<a class="c{n % 8}" style="flex:{each.length}" href="#s{number}d{n}" '
        f'title="{_text(each.name)}: {each.length:,} tokens"></a>'
        for n, each in enumerate(sequence.documents)
    )
    if sequence.padding:
        bar += (
            f'<span class="p" style="flex:{sequence.padding}" title="{sequence.padding:,} of padding"></span>'
        )
    num_targets = sum(each.num_targets for each in sequence.documents)
    documents = documents.replace('id="d', f'id="s{number}d')
    return (
        f"<section><h2>{number}. {_text(sequence.source)}</h2><p>documents: {len(sequence.documents)}, "
        f"{seq_len - sequence.padding:,} of {seq_len:,} tokens, {num_targets:,} with a loss, "
        f'{100 * sequence.padding / seq_len:.1f}% padding</p><div class="bar">{bar}</div>'
        f"{documents}</section>"
    )


def _document(number: int, document: ShownDocument) -> str:
    images = iter(document.images)
    tokens = "".join(_turn(turn, images) for turn in _turns(document.tokens))
    cut = f", from token {document.start:,} on" if document.start else ""
    unusable = "" if document.is_usable else ' <strong class="bad">cannot be used: no loss</strong>'
    return (
        f'<article id="d{number}" class="e{number % 8}"><h3>{_text(document.name)} '
        f"<small>{document.length:,} tokens{cut}</small>{unusable}</h3>"
        f'<div class="tokens">{tokens}</div></article>'
    )


def _turns(tokens: Sequence[ShownToken]) -> Iterator[list[ShownToken]]:
    """Turns of a conversation, each from its opening token on; what is none is in one piece."""
    turn: list[ShownToken] = []
    for token in tokens:
        if token.opens_turn and turn:
            yield turn
            turn = []
        turn.append(token)
    yield turn


def _turn(turn: Sequence[ShownToken], images: Iterator[ShownImage]) -> str:
    tokens = "".join(_token(token, images) for token in turn)
    if not turn or not turn[0].opens_turn:
        return tokens
    # Its heading ends with the next special token.
    heading = list(takewhile(lambda token: not token.is_special, turn[1:]))
    name = "".join(token.text for token in heading)
    num_targets = sum(token.is_target for token in turn)
    told = f"{len(turn):,} tokens" + (f", {num_targets:,} learned" if num_targets else "")
    role = turn[0].text.strip("<|>").removeprefix("im_")
    return f'<div class="turn {_text(role)}"><b>{_text(name)}</b> <small>{told}</small>\n{tokens}</div>'


def _token(token: ShownToken, images: Iterator[ShownImage]) -> str:
    kind = "t" if token.is_target else "s" if token.is_special else "n"
    title = " ".join(map(str, token.ids)) if len(token.ids) < 8 else f"{token.ids[0]} × {len(token.ids)}"
    # A line break is shown, and breaks the line.
    shown = _text(token.text).replace("\n", "<i>⏎</i>\n").replace("\t", "<i>⇥</i>\t")
    span = f'<span class="{kind}" title="{title}">{shown}</span>'
    image = next(images, None) if token.is_special and "×" in token.text else None
    return span if image is None else span + _figure(image)


def _figure(image: ShownImage) -> str:
    height, width = image.pixels.shape[:2]
    picture = Image.fromarray(image.pixels)
    picture.thumbnail((LARGEST_SIDE_PX, LARGEST_SIDE_PX))
    stream = io.BytesIO()
    picture.save(stream, "png")
    data = base64.b64encode(stream.getvalue()).decode()
    frames = f", first of {image.num_frames} frames" if image.num_frames > 1 else ""
    return (
        f'<figure><img alt="" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/png;base64,{data}"><figcaption>{width} × {height} px{frames}, {image.num_tokens:,} '
        "tokens</figcaption></figure>"
    )


def _text(text: str) -> str:
    return html.escape(text)
