//! The hub's conventions: which variables and files say where its cache is, which hub it is, and who asks.

use std::{
    fmt, fs,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use url::Url;

use crate::DownloadError;

/// The hub of those who name none.
const ENDPOINT_DEFAULT: &str = "https://huggingface.co";
/// The first pause after a broken connection; each further one is twice as long.
const PAUSE: Duration = Duration::from_secs(1);
/// Longer than a hub under load thinks, shorter than a user's patience.
const SILENCE: Duration = Duration::from_secs(30);
/// A token's file that is longer holds no token.
const TOKEN_BYTES_MAX: u64 = 4096;

/// A secret of the user's at the hub. It is sent there and nowhere else, and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token, unless it is empty or could not stand in a header.
    pub fn new(text: &str) -> Option<Token> {
        let text = text.trim();
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        plain.then(|| Token(text.into()))
    }

    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Where downloads go and how they are asked for.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The hub (`HF_ENDPOINT`).
    pub endpoint: Url,
    /// The hub's cache, shared with its other clients (`HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`).
    pub cache: PathBuf,
    /// Who asks the hub (`HF_TOKEN`, `HF_TOKEN_PATH`, the file `token`).
    pub token: Option<Token>,
    /// Nothing is asked for on the network (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Where files of plain addresses lie.
    pub downloads: PathBuf,
    /// The first pause before a broken download is taken up again.
    pub pause: Duration,
    /// How long a server may say nothing. There is no limit on the whole: models are large and lines slow.
    pub silence: Duration,
}

impl Settings {
    /// What this process's environment says; files of plain addresses go below `home`.
    ///
    /// # Errors
    /// `HF_ENDPOINT` is no address.
    pub fn of_env(home: &Path) -> Result<Settings, DownloadError> {
        Self::new(home, |name| std::env::var(name).ok())
    }

    /// The same from any variables.
    ///
    /// # Errors
    /// As [`Settings::of_env`].
    pub fn new(
        home: &Path,
        var: impl Fn(&str) -> Option<String>,
    ) -> Result<Settings, DownloadError> {
        let var = |name: &str| var(name).filter(|value| !value.trim().is_empty());
        let is_on = |name: &str| {
            let words = ["1", "on", "yes", "true"];
            var(name).is_some_and(|value| words.contains(&value.trim().to_lowercase().as_str()))
        };
        let path = |name: &str| var(name).map(PathBuf::from);
        let hf_home = path("HF_HOME").unwrap_or_else(|| {
            let user = path("HOME").unwrap_or_default();
            let cache = path("XDG_CACHE_HOME").unwrap_or_else(|| user.join(".cache"));
            cache.join("huggingface")
        });
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let token = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
        let token = if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            None
        } else {
            token.or_else(|| read_token(&token_file))
        };
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT_DEFAULT.into());
        let parsed = Url::parse(endpoint.trim_end_matches('/')).ok();
        let endpoint = parsed
            .filter(|url| !url.cannot_be_a_base() && url.has_host())
            .ok_or(DownloadError::Endpoint { text: endpoint })?;
        Ok(Settings {
            endpoint,
            cache: cache.unwrap_or_else(|| hf_home.join("hub")),
            token: token.as_deref().and_then(Token::new),
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            downloads: home.join("downloads"),
            pause: PAUSE,
            silence: SILENCE,
        })
    }
}

fn read_token(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = fs::File::open(path).ok()?;
    file.take(TOKEN_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vars: &[(&str, &str)]) -> Settings {
        let find = |name: &str| {
            vars.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).into())
        };
        Settings::new(Path::new("/home"), find).unwrap()
    }

    #[test]
    fn the_hubs_variables_are_obeyed_in_its_order() {
        let plain = of(&[("HOME", "/u")]);
        assert_eq!(plain.cache, Path::new("/u/.cache/huggingface/hub"));
        assert_eq!(plain.endpoint.as_str(), "https://huggingface.co/");
        assert!(!plain.offline && plain.token.is_none());
        assert_eq!(
            of(&[("XDG_CACHE_HOME", "/x")]).cache,
            Path::new("/x/huggingface/hub")
        );
        assert_eq!(
            of(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).cache,
            Path::new("/h/hub")
        );
        assert_eq!(
            of(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache,
            Path::new("/c")
        );
        assert!(of(&[("HF_HUB_OFFLINE", "TRUE")]).offline);
        assert!(!of(&[("HF_HUB_OFFLINE", "0")]).offline);
        let bad = Settings::new(Path::new("/"), |name| {
            (name == "HF_ENDPOINT").then(|| "hub".into())
        });
        assert!(bad.is_err());
    }

    #[test]
    fn a_token_comes_from_the_variable_or_its_file_and_is_not_printed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        fs::write(dir.path().join("other"), "hf_other\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let other = dir.path().join("other");
        let other = other.to_str().unwrap();
        assert_eq!(of(&[("HF_HOME", home)]).token, Token::new("hf_file"));
        assert_eq!(
            of(&[("HF_HOME", home), ("HF_TOKEN_PATH", other)]).token,
            Token::new("hf_other")
        );
        let settings = of(&[("HF_HOME", home), ("HF_TOKEN", " hf_var ")]);
        assert_eq!(settings.token, Token::new("hf_var"));
        assert!(!format!("{settings:?}").contains("hf_var"));
        assert!(
            of(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")])
                .token
                .is_none()
        );
        assert!(Token::new("two\nlines").is_none(), "no second header");
    }
}
