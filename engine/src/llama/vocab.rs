//! A model's vocabulary without its weights.

use std::fs::File;

use llama_cpp_sys_2 as sys;

use super::{FileModel, Model};

/// A `llama_vocab` and the model that owns it.
#[derive(Clone)]
pub(crate) struct VocabModel {
    model: Model,
}

impl VocabModel {
    /// Loads the vocabulary of a GGUF.
    pub(crate) fn load(file: File) -> Result<VocabModel, String> {
        Ok(VocabModel {
            model: FileModel::from_file(file, true)?,
        })
    }

    pub(super) fn ptr(&self) -> *const sys::llama_vocab {
        // SAFETY: the model lives.
        unsafe { sys::llama_model_get_vocab(self.model.as_ptr()) }
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: the vocabulary lives.
        unsafe { sys::llama_vocab_n_tokens(self.ptr()) }.unsigned_abs()
    }

    /// Token ids of `text`, which is shorter than `i32::MAX` bytes.
    pub(crate) fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<u32>, String> {
        let len = i32::try_from(text.len()).map_err(|_| "the text is too long")?;
        // A token is a byte of text at least, but for the special ones around.
        let mut tokens: Vec<i32> = vec![0; text.len() + 8];
        for _ in 0..2 {
            let room = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
            // SAFETY: the text has `len` bytes, `tokens` room for `room` ids.
            let n = unsafe {
                sys::llama_tokenize(
                    self.ptr(),
                    text.as_ptr().cast(),
                    len,
                    tokens.as_mut_ptr(),
                    room,
                    add_special,
                    parse_special,
                )
            };
            match n {
                0.. => {
                    tokens.truncate(n.unsigned_abs() as usize);
                    return Ok(tokens.iter().map(|id| id.cast_unsigned()).collect());
                }
                i32::MIN => return Err("the text has too many tokens".into()),
                _ => tokens.resize(n.unsigned_abs() as usize, 0),
            }
        }
        Err("the tokenizer does not agree with itself".into())
    }

    /// The bytes a token stands for; nothing for a control token unless
    /// `special`. `id` is below [`VocabModel::len`].
    pub(crate) fn piece(&self, id: u32, special: bool, out: &mut Vec<u8>) {
        out.resize(out.capacity().max(64), 0);
        for _ in 0..2 {
            let room = i32::try_from(out.len()).unwrap_or(i32::MAX);
            let buffer = out.as_mut_ptr().cast();
            // SAFETY: `out` has room for `room` bytes; `id` is in range.
            let n = unsafe {
                sys::llama_token_to_piece(self.ptr(), id as i32, buffer, room, 0, special)
            };
            if n >= 0 {
                out.truncate(n.unsigned_abs() as usize);
                return;
            }
            out.resize(n.unsigned_abs() as usize, 0);
        }
        out.clear();
    }

    /// Whether `id`, below [`VocabModel::len`], ends a generation.
    pub(crate) fn is_eog(&self, id: u32) -> bool {
        // SAFETY: `id` is in range.
        unsafe { sys::llama_vocab_is_eog(self.ptr(), id as i32) }
    }

    /// The beginning-of-sequence token.
    pub(crate) fn bos(&self) -> Option<u32> {
        // SAFETY: the vocabulary lives.
        u32::try_from(unsafe { sys::llama_vocab_bos(self.ptr()) }).ok()
    }

    /// The end-of-sequence token.
    pub(crate) fn eos(&self) -> Option<u32> {
        // SAFETY: the vocabulary lives.
        u32::try_from(unsafe { sys::llama_vocab_eos(self.ptr()) }).ok()
    }

    /// Whether a prompt begins with [`VocabModel::bos`].
    pub(crate) fn adds_bos(&self) -> bool {
        // SAFETY: the vocabulary lives.
        unsafe { sys::llama_vocab_get_add_bos(self.ptr()) }
    }
}
