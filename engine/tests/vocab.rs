//! Tokenizers from headers, hostile ones and hostile texts included.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use engine::{
    Detokenizer, FileSource, RandomShape, RandomWeights, Vocab, VocabError, random_model,
};
use gguf::{Header, TensorType, Text, Value};

fn byte_header() -> Header {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let weights = RandomWeights::One(TensorType::F16);
    random_model("llama", &RandomShape::tiny(), weights, 1, &path).unwrap();
    FileSource::open(&path).unwrap().header().clone()
}

/// ASCII and a few pairs, as GPT-2 has them.
fn pair_header(pre: &str) -> Header {
    let mut tokens: Vec<Text> = Vec::new();
    for byte in 0..=255u8 {
        let printable = (33..=126).contains(&byte) || (161..=172).contains(&byte) || byte >= 174;
        let n_before = (0..byte)
            .filter(|b| !((33..=126).contains(b) || (161..=172).contains(b) || *b >= 174))
            .count() as u32;
        let char = if printable {
            char::from(byte)
        } else {
            char::from_u32(256 + n_before).unwrap()
        };
        tokens.push(Text::from(char.to_string()));
    }
    for more in ["he", "ll", "hell", "hello", "\u{120}w", "<|endoftext|>"] {
        tokens.push(Text::from(more));
    }
    let mut types = vec![1i32; tokens.len()];
    *types.last_mut().unwrap() = 3;
    let eos = tokens.len() as u32 - 1;
    let merges: Vec<Text> = ["h e", "l l", "he ll", "hell o", "\u{120} w"]
        .map(Text::from)
        .to_vec();
    let kv: Vec<(&str, Value)> = vec![
        ("general.architecture", "llama".into()),
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", pre.into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.token_type", types.into()),
        ("tokenizer.ggml.merges", merges.into()),
        ("tokenizer.ggml.bos_token_id", eos.into()),
        ("tokenizer.ggml.eos_token_id", eos.into()),
    ];
    Header::new(
        32,
        kv.into_iter().map(|(k, v)| (k.into(), v)).collect(),
        vec![],
    )
    .unwrap()
}

fn error(header: &Header) -> String {
    Vocab::from_header(header)
        .err()
        .expect("refused")
        .to_string()
}

#[test]
fn bytes_there_and_back() {
    let vocab = Vocab::from_header(&byte_header()).unwrap();
    assert_eq!(
        (vocab.bos(), vocab.eos(), vocab.adds_bos()),
        (Some(1), Some(2), true)
    );
    assert!(vocab.is_eog(2) && !vocab.is_eog(1) && !vocab.is_eog(9999));
    let text = "Grüße, 世界! 🦀\n\0 end";
    let tokens = vocab.tokenize(text, true, false).unwrap();
    assert_eq!(tokens[0], 1);
    assert_eq!(vocab.detokenize(&tokens), format!(" {text}"));
    assert!(vocab.piece(99_999).is_empty());
    assert_eq!(
        (vocab.piece(1).len(), vocab.token_text(1)),
        (0, "<s>".into())
    );
    assert!(vocab.tokenize("", true, false).unwrap() == [1]);
    assert_eq!(vocab.n_tokens(), 320);
}

#[test]
fn text_comes_in_whole_characters() {
    let vocab = Vocab::from_header(&byte_header()).unwrap();
    let text = "aé世🦀z";
    let tokens = vocab.tokenize(text, false, false).unwrap();
    let mut detokenizer = Detokenizer::new();
    let mut pieces = Vec::new();
    for token in tokens {
        let mut out = String::new();
        detokenizer.push(&vocab, token, &mut out);
        pieces.push(out);
    }
    assert_eq!(pieces.concat(), format!(" {text}"));
    assert!(pieces.iter().all(|piece| piece.chars().count() <= 1));
    let mut out = String::new();
    // Cut off, then something else: one sign for what is lost.
    detokenizer.push_bytes(&[0xf0, 0x9f], &mut out);
    assert_eq!(out, "");
    detokenizer.push_bytes(b"x\xff\xffy\xe4\xb8", &mut out);
    assert_eq!(out, "\u{fffd}x\u{fffd}\u{fffd}y");
    detokenizer.finish(&mut out);
    detokenizer.finish(&mut out);
    assert_eq!(out, "\u{fffd}x\u{fffd}\u{fffd}y\u{fffd}");
}

#[test]
fn special_tokens_in_text_are_text_unless_asked() {
    let vocab = Vocab::from_header(&pair_header("default")).unwrap();
    let eos = vocab.eos().unwrap();
    assert_eq!(vocab.tokenize("<|endoftext|>", false, true).unwrap(), [eos]);
    let plain = vocab.tokenize("<|endoftext|>", false, false).unwrap();
    assert!(plain.len() > 1 && !plain.contains(&eos));
    assert_eq!(vocab.detokenize(&plain), "<|endoftext|>");
    let hello = vocab.tokenize("hello w", false, false).unwrap();
    assert_eq!(hello, [259, 260]);
}

#[test]
fn long_texts_of_pairs_do_not_end_the_process() {
    for pre in [
        "default",
        "llama-bpe",
        "qwen2",
        "gpt-2",
        "deepseek-llm",
        "starcoder",
        "tekken",
    ] {
        let vocab = Vocab::from_header(&pair_header(pre)).unwrap();
        for unit in ["a", " ", "9", "世", "\u{301}", "a1! "] {
            let text = unit.repeat((64 << 10) / unit.len());
            let tokens = vocab.tokenize(&text, false, true).unwrap();
            assert_eq!(
                vocab.detokenize(&tokens).len(),
                text.len(),
                "{pre} {unit:?}"
            );
        }
    }
}

#[test]
fn texts_beyond_the_limit() {
    let vocab = Vocab::from_header(&byte_header()).unwrap();
    // Short of the limit it takes long: llama.cpp is quadratic in bytes that
    // have no better token.
    let text = "a".repeat(16 << 10);
    assert_eq!(
        vocab.tokenize(&text, false, false).unwrap().len(),
        text.len() + 1
    );
    let text = "a".repeat(engine::TEXT_BYTES_MAX + 1);
    let error = vocab.tokenize(&text, false, false).err().unwrap();
    assert!(matches!(error, VocabError::TextLength { .. }));
}

#[test]
fn a_vocabulary_without_bytes_refuses_what_it_cannot_say() {
    let tokens: Vec<Text> = [
        "<unk>",
        "<s>",
        "</s>",
        "\u{2581}",
        "a",
        "b",
        "\u{2581}ab",
        "ab",
    ]
    .map(Text::from)
    .into();
    let mut header = byte_header();
    header.set("tokenizer.ggml.scores", vec![0f32; tokens.len()]);
    header.set("tokenizer.ggml.token_type", vec![2i32, 3, 3, 1, 1, 1, 1, 1]);
    header.set("tokenizer.ggml.tokens", tokens);
    let vocab = Vocab::from_header(&header).unwrap();
    assert_eq!(
        vocab.detokenize(&vocab.tokenize("ab ba", true, false).unwrap()),
        " ab ba"
    );
    assert!(matches!(
        vocab.tokenize("abc", false, false),
        Err(VocabError::Character('c'))
    ));
    assert!(matches!(
        vocab.tokenize("é", false, true),
        Err(VocabError::Character('é'))
    ));
}

#[test]
fn vocabularies_that_would_abort_are_refused() {
    let mut header = byte_header();
    header.set("tokenizer.ggml.model", "none");
    assert!(matches!(Vocab::from_header(&header), Err(VocabError::None)));
    header.set("tokenizer.ggml.model", "rwkv");
    assert!(error(&header).contains("`rwkv` is not supported"));
    header.set("tokenizer.ggml.model", 7u32);
    assert!(error(&header).contains("holds u32"));

    let mut header = byte_header();
    let mut tokens = header.get_texts("tokenizer.ggml.tokens").unwrap().to_vec();
    tokens[300] = tokens[299].clone();
    header.set("tokenizer.ggml.tokens", tokens.clone());
    assert!(error(&header).contains("occurs twice"));
    tokens[300] = Text::from("<0x4>");
    header.set("tokenizer.ggml.tokens", tokens.clone());
    let mut types = vec![1i32; tokens.len()];
    types[300] = 6;
    header.set("tokenizer.ggml.token_type", types);
    assert!(error(&header).contains("is not a byte"));
    header.set("tokenizer.ggml.token_type", vec![1i32; 5]);
    assert!(error(&header).contains("toktypes"));
    header.set("tokenizer.ggml.token_type", vec![1u32; tokens.len()]);
    assert!(error(&header).contains("not i32"));

    let mut header = byte_header();
    header.set("tokenizer.ggml.scores", vec![0f32; 3]);
    assert!(error(&header).contains("scores"));
    header.set("tokenizer.ggml.tokens", Vec::<Text>::new());
    assert!(error(&header).contains("no tokens"));
    header.set("tokenizer.ggml.tokens", vec![1u32, 2]);
    assert!(error(&header).contains("array of u32"));

    let mut header = pair_header("default");
    header.set(
        "tokenizer.ggml.merges",
        vec![Text::from(""), Text::from("x"), Text(vec![0xff])],
    );
    let vocab = Vocab::from_header(&header).unwrap();
    assert_eq!(
        vocab.detokenize(&vocab.tokenize("hello", false, false).unwrap()),
        "hello"
    );
    header.set("tokenizer.ggml.pre", "of-its-own");
    assert!(error(&header).contains("of-its-own"));
    header.set(
        "tokenizer.ggml.tokens",
        vec![Text(vec![0xff, 0xfe]), Text::from("a")],
    );
    assert!(error(&header).contains("not UTF-8"));
}

#[test]
fn special_ids_out_of_range() {
    let mut header = byte_header();
    header.set("tokenizer.ggml.bos_token_id", 4_000_000_000u32);
    header.set("tokenizer.ggml.eos_token_id", u32::MAX);
    header.set("tokenizer.ggml.add_eos_token", true);
    let vocab = Vocab::from_header(&header).unwrap();
    assert!(!vocab.tokenize("a", true, true).unwrap().is_empty());
    let mut tiny = byte_header();
    tiny.set("tokenizer.ggml.tokens", vec![Text::from("a")]);
    tiny.set("tokenizer.ggml.scores", vec![0f32]);
    tiny.set("tokenizer.ggml.token_type", vec![1i32]);
    for key in ["bos", "eos", "unknown"] {
        tiny.set(&format!("tokenizer.ggml.{key}_token_id"), 50u32);
    }
    let vocab = Vocab::from_header(&tiny).unwrap();
    assert!(matches!(
        vocab.tokenize("a", true, false),
        Err(VocabError::NoSpecialToken)
    ));
}
