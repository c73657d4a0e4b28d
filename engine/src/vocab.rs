//! A model's tokenizer, from its header's key-values alone.
//!
//! llama.cpp's tokenizer throws or asserts on vocabularies that lack what it
//! takes for granted, which would end the process: such vocabularies, and texts
//! that would lead there, are refused here first.

use std::collections::HashSet;
use std::io::{BufWriter, Seek, SeekFrom, Write};

use gguf::{Array, GgufError, Header, Text, Value};

use crate::json_schema::Grammar;
use crate::llama::{GrammarState, VocabModel};

/// Longest text tokenized at once: hundreds of thousands of tokens.
pub const TEXT_BYTES_MAX: usize = 1 << 20;
/// From this length on a tokenizer by regular expressions gets a thread with a
/// stack of its own: the C++ library's recurse once per character.
const TEXT_BYTES_ON_STACK: usize = 4 << 10;
/// Stack for each byte of such a text, measured with room to spare.
const STACK_PER_BYTE: usize = 1 << 10;

/// Why there is no vocabulary, or a text is not tokenized.
#[derive(Debug, thiserror::Error)]
pub enum VocabError {
    /// The model says that it has none.
    #[error("the model has no tokenizer: give token ids instead of text")]
    None,
    /// One of another kind.
    #[error("tokenizer `{0}` is not supported (llama and gpt2 are)")]
    Kind(String),
    /// A key is missing or of the wrong type.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// The token list cannot be.
    #[error("tokenizer: {0}")]
    Tokens(String),
    /// llama.cpp refused it.
    #[error("llama.cpp refused the tokenizer: {0}")]
    Backend(String),
    /// A text that is too long.
    #[error("the text has {len} bytes, at most {max} are tokenized at once")]
    TextLength {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A character for which the vocabulary has no token, and no bytes.
    #[error("the vocabulary has no token for {0:?}")]
    Character(char),
    /// The model asks for a token that it does not have.
    #[error("the tokenizer adds a special token that it does not have")]
    NoSpecialToken,
}

/// A tokenizer.
pub struct Vocab {
    model: VocabModel,
    kind: Kind,
    special: bool,
    template: Option<String>,
}

enum Kind {
    /// SentencePiece: what single characters and bytes it can fall back to.
    Pieces {
        bytes: Box<[bool; 256]>,
        chars: HashSet<char>,
        complete: bool,
    },
    /// Byte pairs behind regular expressions.
    Pairs,
}

impl Vocab {
    /// Loads the tokenizer of a header (its tensors are not looked at).
    ///
    /// # Errors
    /// No tokenizer, one that is not supported, or one that cannot be.
    pub fn from_header(header: &Header) -> Result<Vocab, VocabError> {
        let kind = match header.get_str("tokenizer.ggml.model") {
            Err(GgufError::Missing(_)) | Ok("none") => return Err(VocabError::None),
            Ok("llama") => Kind::pieces(header.get_texts("tokenizer.ggml.tokens")?),
            Ok("gpt2") => Kind::Pairs,
            Ok(other) => return Err(VocabError::Kind(other.chars().take(32).collect())),
            Err(error) => return Err(error.into()),
        };
        check_tokens(header, matches!(kind, Kind::Pairs))?;
        let model = load(header)?;
        let adds = |key: &str, default: bool| {
            header
                .get_bool(&format!("tokenizer.ggml.{key}"))
                .unwrap_or(default)
        };
        let pieces = matches!(kind, Kind::Pieces { .. });
        let bos = model.bos().is_some() || !(model.adds_bos() || adds("add_bos_token", pieces));
        let eos = model.eos().is_some() || !adds("add_eos_token", false);
        let template = header
            .get_str("tokenizer.chat_template")
            .ok()
            .map(str::to_owned);
        Ok(Vocab {
            model,
            kind,
            special: bos && eos,
            template,
        })
    }

    /// The beginning of a text that `grammar` allows; `None` where llama.cpp does not take it.
    pub(crate) fn begin(&self, grammar: &Grammar) -> Option<GrammarState> {
        GrammarState::new(&self.model, grammar.text())
    }

    /// Number of tokens.
    pub fn n_tokens(&self) -> u32 {
        self.model.len()
    }

    /// The model's chat template, in Jinja.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// Token ids of `text`. `add_special` puts the tokens around it that the
    /// model wants (usually beginning-of-sequence); `parse_special` reads
    /// special tokens written out in the text: not for text of strangers.
    ///
    /// # Errors
    /// Texts too long or not representable.
    pub fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<u32>, VocabError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(VocabError::TextLength {
                len: text.len(),
                max: TEXT_BYTES_MAX,
            });
        }
        if add_special && !self.special {
            return Err(VocabError::NoSpecialToken);
        }
        self.kind.check(text)?;
        let call = || self.model.tokenize(text, add_special, parse_special);
        let tokens = if matches!(self.kind, Kind::Pairs) && text.len() > TEXT_BYTES_ON_STACK {
            on_a_large_stack(text.len() * STACK_PER_BYTE, call)
        } else {
            call()
        };
        tokens.map_err(VocabError::Backend)
    }

    /// The bytes that `token` stands for; nothing for special tokens and those
    /// outside the vocabulary. Bytes of one character may be spread over
    /// several tokens: see [`Detokenizer`].
    pub fn piece(&self, token: u32) -> Vec<u8> {
        let mut out = Vec::new();
        if token < self.n_tokens() {
            self.model.piece(token, false, &mut out);
        }
        out
    }

    /// The text of `token`, special ones included: for display and templates.
    pub fn token_text(&self, token: u32) -> String {
        let mut out = Vec::new();
        if token < self.n_tokens() {
            self.model.piece(token, true, &mut out);
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Whether `token` ends a generation.
    pub fn is_eog(&self, token: u32) -> bool {
        token < self.n_tokens() && self.model.is_eog(token)
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.model.bos()
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.model.eos()
    }

    /// Whether a prompt begins with [`Vocab::bos`] by the model's wish.
    pub fn adds_bos(&self) -> bool {
        self.model.adds_bos()
    }

    /// Text of `tokens`, with what is not UTF-8 replaced.
    pub fn detokenize(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| self.piece(token)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Turns tokens into text as they come, holding back the bytes of a character
/// until it is whole.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// One with nothing pending.
    pub fn new() -> Detokenizer {
        Detokenizer::default()
    }

    /// Appends to `out` the text that `token` completes.
    pub fn push(&mut self, vocab: &Vocab, token: u32, out: &mut String) {
        self.push_bytes(&vocab.piece(token), out);
    }

    /// The same for the bytes of a token.
    pub fn push_bytes(&mut self, bytes: &[u8], out: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut whole = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(chunk.valid());
            whole += chunk.valid().len();
            let rest = self.pending.len() - whole;
            // Bytes at the end may be the beginning of a character.
            if chunk.invalid().len() < rest || !may_continue(chunk.invalid()) {
                if !chunk.invalid().is_empty() {
                    out.push(char::REPLACEMENT_CHARACTER);
                }
                whole += chunk.invalid().len();
            }
        }
        self.pending.drain(..whole);
    }

    /// Appends what is still pending, replaced, at the end of a generation.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Whether `bytes` could be the beginning of a UTF-8 character.
fn may_continue(bytes: &[u8]) -> bool {
    // A decoder says so: the error of an incomplete sequence has no length.
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}

impl Kind {
    fn pieces(tokens: &[Text]) -> Kind {
        let mut bytes = Box::new([false; 256]);
        let mut chars = HashSet::new();
        for token in tokens {
            if let Some(byte) = byte_of(token.as_bytes()) {
                bytes[usize::from(byte)] = true;
            }
            if let [byte] = token.as_bytes() {
                bytes[usize::from(*byte)] = true;
            }
            let mut of_token = token.as_str().unwrap_or_default().chars();
            if let (Some(char), None) = (of_token.next(), of_token.next()) {
                chars.insert(char);
            }
        }
        let complete = bytes.iter().all(|&there| there);
        Kind::Pieces {
            bytes,
            chars,
            complete,
        }
    }

    /// A character without a token becomes its bytes; llama.cpp throws when one
    /// of them has no token either.
    fn check(&self, text: &str) -> Result<(), VocabError> {
        let Kind::Pieces {
            bytes,
            chars,
            complete: false,
        } = self
        else {
            return Ok(());
        };
        let mut buffer = [0; 4];
        // A space may be put in front, and spaces are escaped.
        for char in std::iter::once(' ').chain(text.chars()) {
            let char = if char == ' ' { '\u{2581}' } else { char };
            let encoded = char.encode_utf8(&mut buffer).as_bytes();
            if !chars.contains(&char) && !encoded.iter().all(|&byte| bytes[usize::from(byte)]) {
                return Err(VocabError::Character(if char == '\u{2581}' {
                    ' '
                } else {
                    char
                }));
            }
        }
        Ok(())
    }
}

/// The byte that `<0x1F>` stands for.
fn byte_of(token: &[u8]) -> Option<u8> {
    let hex = token.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    let hex = std::str::from_utf8(hex).ok().filter(|hex| hex.len() == 2)?;
    u8::from_str_radix(hex, 16).ok()
}

/// What llama.cpp asserts, or throws where nothing catches.
fn check_tokens(header: &Header, pairs: bool) -> Result<(), VocabError> {
    let bad = |why: String| Err(VocabError::Tokens(why));
    let tokens = header.get_texts("tokenizer.ggml.tokens")?;
    if tokens.is_empty() {
        return bad("no tokens".into());
    }
    let mut seen = HashSet::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        // llama.cpp names empty tokens so.
        let name = match token.as_bytes() {
            [] => format!("[EMPTY_{id}]").into_bytes(),
            bytes => bytes.to_vec(),
        };
        if !seen.insert(name) {
            return bad(format!("token {id}, {token:?}, occurs twice"));
        }
        if pairs && token.as_str().is_none() {
            return bad(format!("token {id} is not UTF-8"));
        }
    }
    let Some(types) = header.get("tokenizer.ggml.token_type") else {
        return Ok(());
    };
    let Value::Array(Array::I32(types)) = types else {
        return bad("token types are not i32".into());
    };
    for (id, (token, ty)) in tokens.iter().zip(types).enumerate() {
        if *ty == 6 && byte_of(token.as_bytes()).is_none() {
            return bad(format!("token {id}, {token:?}, is not a byte"));
        }
    }
    Ok(())
}

fn load(header: &Header) -> Result<VocabModel, VocabError> {
    let io = |error: std::io::Error| VocabError::Header(error.into());
    let kept = |key: &str| key.starts_with("tokenizer.ggml.") || key == "general.architecture";
    let kv = header
        .kv
        .iter()
        .filter(|(key, _)| kept(key))
        .cloned()
        .collect();
    let small = Header::new(gguf::ALIGNMENT_DEFAULT, kv, Vec::new())?;
    let mut file = tempfile::tempfile().map_err(io)?;
    let mut writer = BufWriter::new(&mut file);
    small.write(&mut writer)?;
    writer.flush().map_err(io)?;
    drop(writer);
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    VocabModel::load(file).map_err(VocabError::Backend)
}

fn on_a_large_stack<T: Send>(
    stack: usize,
    call: impl FnOnce() -> Result<T, String> + Send,
) -> Result<T, String> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("tokenize".into())
            .stack_size(stack + (1 << 20))
            .spawn_scoped(scope, call)
            .map_err(|error| format!("no thread to tokenize on: {error}"))?
            .join()
            .unwrap_or_else(|_| Err("the tokenizer panicked".into()))
    })
}
