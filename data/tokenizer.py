"""
Tokenizers without a download: plain bytes, or byte-pair encoding trained in seconds. And GPT-2's.

Byte-pair encoding (Gage 1994; Sennrich et al. 2016, arxiv.org/abs/1508.07909) starts from the 256
bytes and again and again turns the most frequent pair of neighbours into a new token. The list
of tokens in the order of their birth, the "ranks", is the whole tokenizer: to encode a word, merge
the pair of lowest rank until none is left. We train the ranks, tiktoken applies them.

A tokenizer is a dict, and is stored so in meta.json:
  tokenizer   'bytes', 'bpe' or 'gpt2': GPT-2's, or another with its pattern, from convert/
  vocab_size  number of ids: the ranks, then the special tokens
  pattern     regular expression that cuts text into words; no token crosses a cut
  ranks       tokens in order, as strings of one character per byte (latin-1: lossless, readable)
  special     {name: id} of tokens that no text encodes to; empty for bytes. The first ends a
              document. In an imported tokenizer, some stand among the ranks, in their places
"""
import heapq
import threading
from collections import Counter, defaultdict

import regex
import tiktoken

EOT = '<|endoftext|>'  # ends every document
MAX_BYTES = 16         # of a token; costs 0.5 % of compression, long runs of spaces trip engines
MAX_WORD = 256         # the trainer looks at no more of a word: a file of base64 is one huge word

# what llama.cpp and others call qwen2, so that text gives the same ids there. {1,256} is ours:
# with a plain + a million spaces overflow the stack of tiktoken's regular expressions. So more
# than 256 blanks in a row may give other ids
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r'|[^\r\n\p{L}\p{N}]?\p{L}+'             # letters after a space or sign: 'if', ' if', '.join'
    r'|\p{N}'                               # a digit
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+'  # signs and line ends: ' +=', '):\n'
    r'|\s{1,256}(?!\S)|\s+'                 # spaces, all but the last, which starts the next word
)


def train_bpe(text, vocab_size):
    """
    Learn byte-pair encoding from `text`: a list of `vocab_size` tokens (bytes) in rank order, the
    256 single bytes, then the merges. Fewer if no pair is left that occurs twice.

    Deterministic: of equally frequent candidates the smallest bytes win, so neither hash seeds
    nor the order of the text matter. No token has more than MAX_BYTES bytes.
    """
    # count each distinct word once: 40,000 of them in 7 MB of Python instead of 2 million
    words = Counter(found[0][:MAX_WORD] for found in regex.finditer(PATTERN, text))
    repeats = list(words.values())
    words = [[bytes([byte]) for byte in word.encode()] for word in words]
    # a candidate is the token that a pair would become. tiktoken merges every pair that spells a
    # token, however it is cut, so 'a' + 'bc' and 'ab' + 'c' are one candidate: 'abc'
    count, where = Counter(), defaultdict(set)  # candidate -> occurrences, words that have it
    for i, word in enumerate(words):
        for token in candidates(word):
            count[token] += repeats[i]
            where[token].add(i)
    heap = [(-n, token) for token, n in count.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    known = set(tokens)
    while heap and len(tokens) < vocab_size:
        n, token = heapq.heappop(heap)
        if -n != count[token] or -n < 2:
            continue  # its count has changed since, and was pushed again; or nothing to gain
        if token not in known:  # it can come up again, cut in another way: merged, but no new id
            tokens.append(token)
            known.add(token)
        changed = set()
        for i in where.pop(token):
            old, words[i] = words[i], merge(words[i], token)
            for sign, word in ((-1, old), (1, words[i])):
                for other in candidates(word):
                    count[other] += sign * repeats[i]
                    where[other].add(i)
                    changed.add(other)
        for other in changed:
            heapq.heappush(heap, (-count[other], other))
    return tokens


def candidates(word):
    """The tokens that merging two neighbours of `word`, a list of tokens, could give."""
    return [a + b for a, b in zip(word, word[1:]) if len(a) + len(b) <= MAX_BYTES]


def merge(word, token):
    """`word`, a list of tokens, with every pair of neighbours that spells `token` merged."""
    out, i = [], 0
    while i < len(word):
        paired = i + 1 < len(word) and word[i] + word[i + 1] == token
        out.append(token if paired else word[i])
        i += 2 if paired else 1
    return out


def make_tokenizer(which, text=''):
    """
    The tokenizer dict for `which`: 256 is plain bytes, a larger number is a BPE trained on `text`
    of that many ids, the last of them EOT, 'gpt2' is GPT-2's, and the path of a checkpoint is the
    one that it was trained with. SystemExit says what is wrong.
    """
    if which == 'gpt2':
        return gpt2_tokenizer()
    if str(which).endswith('.pt'):
        return checkpoint_tokenizer(which)
    if not str(which).isdecimal() or not 256 <= int(which) <= 2**20:
        raise SystemExit(f'--tokenizer={which}: give 256 (bytes), 257 to {2**20} (BPE), gpt2, or '
                         'the path of a checkpoint, which ends in .pt')
    if int(which) == 256:
        return tokenizer_dict('bytes', r'[\s\S]', [bytes([byte]) for byte in range(256)])
    return tokenizer_dict('bpe', PATTERN, train_bpe(text, int(which) - 1), EOT)


def tokenizer_dict(kind, pattern, ranks, *special):
    """The dict described above, from `ranks` as bytes; ids of `special` follow those of ranks."""
    return {'tokenizer': kind, 'vocab_size': len(ranks) + len(special), 'pattern': pattern,
            'special': {name: len(ranks) + i for i, name in enumerate(special)},
            'ranks': [token.decode('latin-1') for token in ranks]}


def checkpoint_tokenizer(path):
    """The tokenizer dict of a checkpoint of train.py: it can be fine-tuned on data made so."""
    from config import load
    from train import Config

    return load(path, Config)['tokenizer']


def gpt2_tokenizer(timeout=60):
    """GPT-2's tokenizer dict (50,257 ids), which tiktoken downloads once and then caches."""
    from tiktoken_ext.openai_public import gpt2
    found = {}

    def load():
        try:
            found.update(gpt2())
        except Exception as error:  # whatever it is, the line below must be able to say it
            found['error'] = type(error).__name__

    # tiktoken downloads without a timeout, and would wait forever behind a firewall that drops
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    if 'mergeable_ranks' not in found:
        raise SystemExit(
            f"cannot download GPT-2's tokenizer ({found.get('error', 'timeout')}): run this once "
            'with a network and TIKTOKEN_CACHE_DIR set to a folder that stays, or use '
            '--dataset=python, which needs no download')
    ranks = sorted(found['mergeable_ranks'], key=found['mergeable_ranks'].get)
    return tokenizer_dict('gpt2', found['pat_str'], ranks, EOT)


def encoding(meta):
    """
    The tiktoken.Encoding of a tokenizer dict or meta.json. Use its encode_ordinary(text) -> ids
    (so that '<|endoftext|>' in a text stays text), decode(ids) -> text and n_vocab.
    """
    special = {*meta['special'].values()}       # also those that stand among the ranks
    ranks = {token.encode('latin-1'): i for i, token in enumerate(meta['ranks'])
             if i not in special}
    return tiktoken.Encoding(meta['tokenizer'], pat_str=meta['pattern'],
                             mergeable_ranks=ranks, special_tokens=meta['special'])
