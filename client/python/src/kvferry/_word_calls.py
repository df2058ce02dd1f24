"""The client's calls about words by which either side says when pages are ready."""

from __future__ import annotations

from kvferry._session import Session
from kvferry.errors import Code, KvferryError, invalid


class WordCalls(Session):
    def alloc_word(self) -> int:
        """A timeline word for ready conditions, starting at 0. RESOURCE_EXHAUSTED NO_WORD."""
        attachment = self._current().attachment
        with self._lock:
            word = _first_free(self._timeline_used, attachment.words.timeline_words)
            self._timeline_values[word] = 0
            attachment.words.set_timeline(word, 0)
        return word

    def free_word(self, word: int) -> None:
        with self._lock:
            self._timeline_used.discard(word)

    def signal(self, word: int, value: int) -> None:
        """Advances a timeline word from the CPU. WORD_OUT_OF_RANGE."""
        attachment = self._current().attachment
        if not 0 <= word < attachment.words.timeline_words:
            raise invalid("WORD_OUT_OF_RANGE", "no such timeline word", "word")
        with self._lock:
            self._timeline_values[word] = value
        attachment.words.set_timeline(word, value)
        attachment.ring()

    def alloc_done_word(self) -> int:
        """A word that the daemon sets (DoneWord). RESOURCE_EXHAUSTED NO_WORD."""
        attachment = self._current().attachment
        with self._lock:
            word = _first_free(self._done_used, attachment.words.done_words)
            attachment.words.set_done(word, 0)
        return word

    def free_done_word(self, word: int) -> None:
        with self._lock:
            self._done_used.discard(word)

    def done_value(self, word: int) -> int:
        """The value of a done word; 0 while not attached."""
        with self._lock:
            connection = self._connection
        return 0 if connection is None else connection.attachment.words.done(word)

    def register_words_with_device(self, device: int = 0) -> None:
        """Registers the words with CUDA, for streams of one device, also after later restarts. May
        be repeated. Blocks. WORDS_REGISTERED for another device; errors of the driver."""
        self._pools.register_words(self._current().attachment, device)

    def signal_on_stream(self, stream: int, word: int, value: int) -> None:
        """`stream`, a cudaStream_t (torch: `stream.cuda_stream`), sets the timeline word when it
        gets there. WORDS_NOT_REGISTERED, STREAM_WORDS_UNSUPPORTED."""
        self._pools.device_words(self._current().attachment).write(stream, word, value)

    def wait_on_stream(self, stream: int, done_word: int, value: int) -> None:
        """`stream` waits until the done word has reached the value (below 2^63). Never blocks the
        caller; errors as signal_on_stream."""
        self._pools.device_words(self._current().attachment).wait(stream, done_word, value)

    def export_event(self, event: int) -> bytes:
        """The 64 bytes of a cudaEvent_t for Ready.cuda_event, made with the flags interprocess and
        disable-timing. EVENT_NOT_SHAREABLE."""
        self._check_alive()
        return self._pools.gpus().export_event(event)


def _first_free(used: set[int], count: int) -> int:
    for word in range(count):
        if word not in used:
            used.add(word)
            return word
    raise KvferryError(Code.RESOURCE_EXHAUSTED, "NO_WORD", "all words are in use")
