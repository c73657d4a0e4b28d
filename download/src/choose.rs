//! Which `.gguf` of a repository is meant, and which files one model is split into. Pure.

use crate::source::is_gguf;

/// What is taken where nobody says, as other programs do.
const TAG_DEFAULT: &str = "Q4_K_M";
/// Most files of one model.
const PARTS_MAX: u32 = 1024;

/// What a repository has for a wish.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// This file.
    One(String),
    /// None of these.
    None(Vec<String>),
    /// Any of these.
    Many(Vec<String>),
}

/// Of a repository's files the model that fits `tag`; without a tag the only one, or the usual one.
pub(crate) fn choose(files: &[String], tag: Option<&str>) -> Choice {
    let models = models(files);
    let fitting = |tag: &str| -> Vec<String> {
        let fits = models.iter().filter(|file| has_word(file, tag));
        fits.cloned().collect()
    };
    let found = match tag {
        Some(tag) => fitting(tag),
        None if models.len() == 1 => models.clone(),
        None => fitting(TAG_DEFAULT),
    };
    match (&found[..], tag) {
        ([one], _) => Choice::One(one.clone()),
        ([], Some(_)) => Choice::None(models),
        ([], None) if models.is_empty() => Choice::None(models),
        ([], None) => Choice::Many(models),
        _ => Choice::Many(found),
    }
}

/// The models among a repository's files: of several parts the first, and what only goes with a model left out.
pub(crate) fn models(files: &[String]) -> Vec<String> {
    let is_model = |file: &&String| {
        let name = file
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        let first = part(file).is_none_or(|part| part.no == 1);
        is_gguf(&name) && first && !name.contains("mmproj") && !name.contains("imatrix")
    };
    let mut models: Vec<String> = files.iter().filter(is_model).cloned().collect();
    models.sort();
    models
}

/// Whether `tag` stands in a file's name (or its folder's) as a word: `Q4_K` is not in `Q4_K_M`.
fn has_word(file: &str, tag: &str) -> bool {
    let (file, tag) = (file.to_ascii_lowercase(), tag.to_ascii_lowercase());
    let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
    file.match_indices(&tag).any(|(at, _)| {
        let before = file[..at].chars().next_back();
        let after = file[at + tag.len()..].chars().next();
        !before.is_some_and(inside) && !after.is_some_and(inside)
    })
}

/// One file of several.
struct Part<'a> {
    stem: &'a str,
    no: u32,
    count: u32,
}

/// `stem-00002-of-00005.gguf`.
fn part(file: &str) -> Option<Part<'_>> {
    let name = file.strip_suffix(".gguf")?;
    let (rest, count) = name.rsplit_once("-of-")?;
    let (stem, no) = rest.rsplit_once('-')?;
    let number = |digits: &str| match digits.len() {
        5 => digits.parse::<u32>().ok(),
        _ => None,
    };
    let (no, count) = (number(no)?, number(count)?);
    ((1..=count).contains(&no) && count <= PARTS_MAX).then_some(Part { stem, no, count })
}

/// All files of the model that `file` is, or is a part of, in order.
pub(crate) fn parts(file: &str) -> Vec<String> {
    match part(file) {
        None => vec![file.into()],
        Some(Part { stem, count, .. }) => (1..=count)
            .map(|no| format!("{stem}-{no:05}-of-{count:05}.gguf"))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_word_chooses_and_what_is_ambiguous_is_listed() {
        let repo = files(&[
            "README.md",
            "m-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
            "big/m-Q8_0-00001-of-00002.gguf",
            "big/m-Q8_0-00002-of-00002.gguf",
            "mmproj-Q8_0.gguf",
        ]);
        let one = |name: &str| Choice::One(name.into());
        assert_eq!(choose(&repo, Some("q4_k_s")), one("m-Q4_K_S.gguf"));
        assert_eq!(
            choose(&repo, Some("Q8_0")),
            one("big/m-Q8_0-00001-of-00002.gguf")
        );
        assert_eq!(choose(&repo, None), one("m-Q4_K_M.gguf"), "the usual");
        let all = [
            "big/m-Q8_0-00001-of-00002.gguf",
            "m-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
        ];
        assert_eq!(
            choose(&repo, Some("Q4_K")),
            Choice::None(files(&all)),
            "only whole words"
        );
        let two = files(&["a-Q5_0.gguf", "b-Q5_0.gguf"]);
        assert_eq!(choose(&two, Some("Q5_0")), Choice::Many(two.clone()));
        assert_eq!(choose(&two, None), Choice::Many(two.clone()));
        assert_eq!(
            choose(&files(&["only-BF16.gguf"]), None),
            one("only-BF16.gguf")
        );
        assert_eq!(
            choose(&files(&["x.safetensors"]), None),
            Choice::None(vec![])
        );
    }

    #[test]
    fn parts_are_all_or_one() {
        assert_eq!(parts("a/m.gguf"), ["a/m.gguf"]);
        assert_eq!(
            parts("a/m-00002-of-00002.gguf"),
            ["a/m-00001-of-00002.gguf", "a/m-00002-of-00002.gguf"]
        );
        for single in [
            "m-0001-of-0002.gguf",
            "m-00003-of-00002.gguf",
            "m-00001-of-99999.gguf",
        ] {
            assert_eq!(parts(single), [single]);
        }
    }
}
