"""How surprising a text is to a model of a reference text: prepare.py --reference.

    model = NGram()
    model.learn(reference_text)
    surprise = model.perplexity(text)

Perplexity is high for text that is unlike the reference.
"""

import numpy as np

from corpus.ngrams import codes_of, mixed, ngram_hashes

MAX_PERPLEXITY = 1500  # per character, of prose under a model of a reference source


class NGram:
    """Perplexity under a model of 4-grams of characters, counted in a reference.

        p_n(c | n - 1 characters before) = (count(n-gram) + k p_{n-1}(c | n - 2 before)) / (count(context) + k)
        p_0 = 1 / 2^16

    Dirichlet smoothing towards the next shorter context (MacKay and Peto 1995). Counts are in tables addressed by hash.
    No n-gram is taken to be more frequent than its context, so a new one looks known only if both collide with others.
    """

    ORDER, STRENGTH, BITS = 4, 5.0, 23

    def __init__(self, tables=None):
        """tables: [ORDER, 2, 2^BITS] uint32, for each order the counts of n-grams and of their contexts."""
        self.tables = np.zeros((self.ORDER, 2, 1 << self.BITS), dtype=np.uint32) if tables is None else tables

    def cells(self, text):
        """For n = 1 .. ORDER the cells of the n-gram that ends at each character and of its context, [len(text)] each.

        ORDER newlines are put before the text, as the context of its first characters.
        """
        codes = np.concatenate([np.full(self.ORDER, ord("\n"), dtype=np.uint32), codes_of(text)])
        hashes = [np.zeros(len(codes), dtype=np.uint64)] + [ngram_hashes(codes, n) for n in range(1, self.ORDER + 1)]
        cells = [mixed(h) >> np.uint64(64 - self.BITS) for h in hashes]
        return [(cells[n][-len(text) :], cells[n - 1][-len(text) - 1 : -1]) for n in range(1, self.ORDER + 1)]

    def learn(self, text):
        """Count the n-grams of a text."""
        for tables, cells in zip(self.tables, self.cells(text) if text else ()):
            for table, at in zip(tables, cells):
                np.add.at(table, at, 1)

    def perplexity(self, text):
        """exp of the mean nats per character; 0 for an empty text."""
        if not text:
            return 0.0
        p = 1 / 65_536
        for (grams, contexts), (gram, context) in zip(self.tables, self.cells(text)):
            seen = contexts[context]
            p = (np.minimum(grams[gram], seen) + self.STRENGTH * p) / (seen + self.STRENGTH)
        return float(np.exp(-np.log(p).mean()))
