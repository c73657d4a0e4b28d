//! Where the prompt comes from: an argument, or stdin when there is none or it is `-`.

use std::io::Read;

use crate::failure::Failure;
use crate::terminal;

/// Far beyond any context window; a mistaken `shoal run < model.gguf` ends here and not in swap.
const PROMPT_BYTES_MAX: u64 = 16 << 20;

/// The prompt of this run.
pub fn read(argument: Option<&str>) -> Result<String, Failure> {
    match argument {
        Some(text) if text != "-" => Ok(text.to_string()),
        _ => {
            if terminal::stdin_is_terminal() {
                terminal::note("type the prompt, then Ctrl-D on a line of its own");
            }
            from_reader(std::io::stdin().lock())
        }
    }
}

fn from_reader(reader: impl Read) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    reader
        .take(PROMPT_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::new(format!("reading the prompt from stdin: {error}")))?;
    if bytes.len() as u64 > PROMPT_BYTES_MAX {
        return Err(Failure::new(format!(
            "the prompt on stdin is longer than {PROMPT_BYTES_MAX} bytes"
        )));
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|error| Failure::new(format!("the prompt on stdin is not UTF-8: {error}")))?;
    // `echo` adds a line end nobody meant; any further ones were meant.
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

/// Token ids separated by spaces, commas or line ends.
pub fn token_ids(text: &str) -> Result<Vec<u32>, Failure> {
    text.split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .map(|word| {
            word.parse().map_err(|_| {
                Failure::usage(format!(
                    "`{}` is not a token id",
                    crate::figures::printable(word, 40)
                ))
                .try_this(
                    "with --tokens the prompt is numbers: `shoal run --tokens \"1 15043 3186\"`",
                )
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_end_is_taken_off() {
        assert_eq!(from_reader(&b"hello\n"[..]).unwrap(), "hello");
        assert_eq!(from_reader(&b"hello\r\n"[..]).unwrap(), "hello");
        assert_eq!(from_reader(&b"hello\n\n"[..]).unwrap(), "hello\n");
        assert_eq!(from_reader(&b""[..]).unwrap(), "");
    }

    #[test]
    fn a_model_is_not_a_prompt() {
        assert!(from_reader(&b"GGUF\xff\xfe"[..]).is_err());
        let endless = std::io::repeat(b'a');
        assert!(from_reader(endless).is_err());
    }

    #[test]
    fn ids_by_space_or_comma() {
        assert_eq!(token_ids("1, 2\n3,4").unwrap(), [1, 2, 3, 4]);
        assert!(token_ids("1 two").is_err());
        assert!(token_ids("-1").is_err());
        assert!(token_ids("").unwrap().is_empty());
    }
}
