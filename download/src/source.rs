//! What the user may write for a model's file. Pure.
//!
//! ```text
//! hf:owner/repo/file.gguf[@revision]     one file (of several: all of them)
//! hf:owner/repo[:Q4_K_M][@revision]      the one that fits
//! https://host/path/file.gguf            a plain address; the hub's own pages count as hf:
//! anything else                          a file here
//! ```

use std::{path::PathBuf, str::FromStr};

use url::Url;

/// Of the hub, where nobody says which.
pub(crate) const REVISION_DEFAULT: &str = "main";
/// Longest text of a source: addresses with signatures in them are long.
const TEXT_BYTES_MAX: usize = 4096;
/// Longest name of a repository, a file or a revision on the hub.
const NAME_BYTES_MAX: usize = 512;

/// Where a file comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// It is here.
    File(PathBuf),
    /// Hugging Face, or a hub that speaks its API.
    Hub(HubSource),
    /// Anybody's server.
    Url(Url),
}

/// A file on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubSource {
    /// `owner/repo`.
    pub repo: String,
    /// Which of its files.
    pub wish: Wish,
    /// A branch, a tag or a commit.
    pub revision: String,
}

/// Which of a repository's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// This one, as a path in the repository.
    File(String),
    /// The `.gguf` whose name holds this word, such as `Q4_K_M`; without one the usual.
    Tag(Option<String>),
}

/// Why a text is no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no source of a model: {why}")]
pub struct SourceError {
    /// What was given, shortened, without what stands behind a `?`.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

impl Source {
    /// Whether it has to be fetched.
    pub fn is_remote(&self) -> bool {
        !matches!(self, Source::File(_))
    }
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let wrong = |why| SourceError {
            text: shown(text),
            why,
        };
        if text.len() > TEXT_BYTES_MAX {
            return Err(wrong("it is too long"));
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return hub(rest).map(Source::Hub).map_err(wrong);
        }
        if text.starts_with("https://") || text.starts_with("http://") {
            let url = Url::parse(text).map_err(|_| wrong("it is no address"))?;
            if !url.username().is_empty() || url.password().is_some() {
                return Err(wrong("a name or password in an address is not used"));
            }
            file_name(&url).ok_or_else(|| wrong("the address must end in a .gguf file"))?;
            return Ok(Source::Url(url));
        }
        Ok(Source::File(text.into()))
    }
}

fn hub(text: &str) -> Result<HubSource, &'static str> {
    let text = text.trim_start_matches('/');
    let (text, revision) = match text.rsplit_once('@') {
        Some((text, revision)) => (text, revision),
        None => (text, REVISION_DEFAULT),
    };
    let mut parts = text.splitn(3, '/');
    let (Some(owner), Some(repo)) = (parts.next(), parts.next()) else {
        return Err("write hf:OWNER/REPO/FILE.gguf or hf:OWNER/REPO:Q4_K_M");
    };
    let (repo, wish) = match (parts.next(), repo.split_once(':')) {
        (Some(file), None) if is_gguf(file) => (repo, Wish::File(file.into())),
        (None, Some((repo, tag))) if is_name(tag) => (repo, Wish::Tag(Some(tag.into()))),
        (None, None) => (repo, Wish::Tag(None)),
        _ => return Err("the file must be a .gguf"),
    };
    let source = HubSource {
        repo: format!("{owner}/{repo}"),
        wish,
        revision: revision.into(),
    };
    source.check()?;
    Ok(source)
}

impl HubSource {
    /// Every part becomes a path in a folder of ours.
    fn check(&self) -> Result<(), &'static str> {
        if self.repo.split('/').count() != 2 || !self.repo.split('/').all(is_name) {
            return Err("a repository is OWNER/REPO, of letters, digits, '.', '-' and '_'");
        }
        if !is_path(&self.revision) {
            return Err("that is no revision");
        }
        match &self.wish {
            Wish::File(file) if !is_path(file) => Err("that is no path of a file in a repository"),
            _ => Ok(()),
        }
    }
}

/// The hub's own pages and downloads (`/owner/repo/blob/main/file.gguf`) are sources on the hub.
pub(crate) fn on_hub(url: &Url, endpoint: &Url) -> Option<HubSource> {
    if url.origin() != endpoint.origin() || url.path().contains('%') {
        return None;
    }
    let path = url.path().strip_prefix(endpoint.path())?;
    let mut parts = path.trim_start_matches('/').splitn(5, '/');
    let (owner, repo, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let (revision, file) = (parts.next()?, parts.next()?);
    let source = HubSource {
        repo: format!("{owner}/{repo}"),
        wish: Wish::File(file.into()),
        revision: revision.into(),
    };
    let ours = matches!(kind, "resolve" | "blob") && is_gguf(file);
    (ours && source.check().is_ok()).then_some(source)
}

/// The last part of an address, when it is a `.gguf` that can be a file's name here.
pub(crate) fn file_name(url: &Url) -> Option<String> {
    let last = url.path_segments()?.next_back()?;
    let name: String = last
        .chars()
        .map(|c| if is_name_char(c) { c } else { '-' })
        .collect();
    (is_gguf(&name) && is_name(&name)).then_some(name)
}

/// An address without what stands behind a `?`, which may be a key.
pub(crate) fn shown(address: &str) -> String {
    let plain = address.split(['?', '#']).next().unwrap_or_default();
    plain.chars().take(200).collect()
}

pub(crate) fn is_gguf(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.len() > ".gguf".len() && name.ends_with(".gguf")
}

/// A path of names, for a folder of ours: it cannot lead out of it.
pub(crate) fn is_path(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', '\0'])
    };
    text.len() <= NAME_BYTES_MAX
        && !text.chars().any(char::is_control)
        && text.split('/').all(plain)
}

fn is_name(text: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&text.len())
        && !text.starts_with('.')
        && text.chars().all(is_name_char)
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub_of(text: &str) -> HubSource {
        match text.parse() {
            Ok(Source::Hub(hub)) => hub,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn the_hubs_sources_are_read_as_people_write_them() {
        let file = hub_of("hf:owner/repo/sub/m-Q8_0.gguf@refs/pr/1");
        assert_eq!(file.repo, "owner/repo");
        assert_eq!(file.wish, Wish::File("sub/m-Q8_0.gguf".into()));
        assert_eq!(file.revision, "refs/pr/1");
        assert_eq!(hub_of("hf:owner/repo/m.gguf").revision, "main");
        assert_eq!(hub_of("hf://owner/repo").wish, Wish::Tag(None));
        let tagged = hub_of("hf:owner/repo:Q4_K_M@v1");
        assert_eq!(tagged.wish, Wish::Tag(Some("Q4_K_M".into())));
        assert_eq!(
            (tagged.repo.as_str(), tagged.revision.as_str()),
            ("owner/repo", "v1")
        );
        for wrong in [
            "hf:",
            "hf:owner",
            "hf:owner/repo/file.bin",
            "hf:owner/../x.gguf",
            "hf:../repo",
            "hf:owner/repo/../../x.gguf",
            "hf:owner/repo/x.gguf@../main",
            "hf:owner/repo:a/b",
            "hf:owner/repo:a/x.gguf",
            "hf:owner/repo/a//x.gguf",
            "hf:own er/repo",
            "hf:owner/repo@",
        ] {
            assert!(wrong.parse::<Source>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_and_files() {
        assert_eq!("m.gguf".parse(), Ok(Source::File("m.gguf".into())));
        assert!(matches!(
            "https://x.org/a/m.gguf?key=1".parse(),
            Ok(Source::Url(_))
        ));
        for wrong in [
            "https://x.org/",
            "https://x.org/m.bin",
            "https://u:p@x.org/m.gguf",
            "https://",
        ] {
            assert!(wrong.parse::<Source>().is_err(), "{wrong}");
        }
        let error = "https://x.org/m?key=secret".parse::<Source>().unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
    }

    #[test]
    fn the_hubs_pages_are_its_files() {
        let endpoint = Url::parse("https://hub.example").unwrap();
        let at = |text: &str| on_hub(&Url::parse(text).unwrap(), &endpoint);
        let page = at("https://hub.example/owner/repo/blob/main/d/m.gguf?download=true").unwrap();
        assert_eq!(page, hub_of("hf:owner/repo/d/m.gguf"));
        assert!(at("https://other.example/owner/repo/resolve/main/m.gguf").is_none());
        assert!(at("https://hub.example/owner/repo/raw/main/m.gguf").is_none());
        assert!(at("https://hub.example/m.gguf").is_none());
    }
}
