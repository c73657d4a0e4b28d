//! Settings of both binaries, with one precedence: flags, then `SHOAL_*` variables, then the config
//! file, then the ticket this home joined with, then defaults. Reads files, starts nothing.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use etcetera::{AppStrategy, AppStrategyArgs, choose_app_strategy};
use swarm_proto::{Peer, SwarmId, Ticket};

use crate::{identity::open_to_others, net::Access};

mod file;

pub use file::FileConfig;
use file::parse_file;

/// The swarm of those who name none.
const DEFAULT_SWARM: &str = "shoal";
/// The ticket a home joined with, in its text form; it may hold the swarm's key, so mode 0600.
const TICKET_FILE: &str = "ticket";
/// A config file or ticket longer than this is not one.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Words for yes and no, in variables, in the config file and where a flag takes one.
///
/// # Errors
/// Says what is expected.
pub fn parse_bool(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(format!(
            "{text:?} is neither on nor off (1, true, yes; 0, false, no)"
        )),
    }
}

/// Flags that say which swarm, as whom, and whom to trust.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SwarmArgs {
    /// Directory of the identity, the store and the settings.
    #[arg(
        long,
        value_name = "DIR",
        env = "SHOAL_HOME",
        help_heading = "Settings",
        global = true
    )]
    pub home: Option<PathBuf>,
    /// Config file [default: config.toml in the home directory, then in the user's config directory].
    #[arg(
        long,
        value_name = "FILE",
        env = "SHOAL_CONFIG",
        help_heading = "Settings",
        global = true
    )]
    pub config: Option<PathBuf>,
    /// Name of the swarm; peers of other swarms are left alone [default: shoal].
    #[arg(
        long,
        value_name = "ID",
        env = "SHOAL_SWARM",
        help_heading = "Swarm",
        global = true
    )]
    pub swarm: Option<SwarmId>,
    /// File with the key of a private swarm (64 hex digits); TCP only.
    #[arg(
        long,
        value_name = "FILE",
        env = "SHOAL_KEY_FILE",
        help_heading = "Swarm",
        global = true
    )]
    pub key_file: Option<PathBuf>,
    /// Address of a peer to stay connected to; may be given several times.
    #[arg(
        long,
        value_name = "ADDR",
        env = "SHOAL_PEER",
        value_delimiter = ',',
        help_heading = "Swarm",
        global = true
    )]
    pub peer: Vec<String>,
    /// Find peers on the local network [default: on].
    #[arg(
        long,
        value_name = "on|off",
        env = "SHOAL_MDNS",
        value_parser = parse_bool,
        help_heading = "Swarm",
        global = true
    )]
    pub mdns: Option<bool>,
    /// Talk to this peer id and the others listed, to nobody else, in either direction.
    #[arg(
        long,
        value_name = "PEER",
        env = "SHOAL_ALLOW",
        value_delimiter = ',',
        help_heading = "Swarm",
        global = true
    )]
    pub allow: Vec<Peer>,
    /// Dial only listed peers: those of --allow, or else those that --peer names by id.
    #[arg(long, env = "SHOAL_TRUSTED", value_parser = parse_bool, help_heading = "Swarm", global = true)]
    pub trusted: bool,
    /// Export traces to this OpenTelemetry collector, for example http://127.0.0.1:4317.
    #[arg(
        long,
        value_name = "URL",
        env = "SHOAL_OTLP",
        help_heading = "Logging",
        global = true
    )]
    pub otlp: Option<String>,
    /// What to log, for example info or node=debug,libp2p=warn.
    #[arg(
        long,
        value_name = "FILTER",
        env = "SHOAL_LOG",
        help_heading = "Logging",
        global = true
    )]
    pub log: Option<String>,
    /// Log as JSON lines.
    #[arg(long, env = "SHOAL_LOG_JSON", value_parser = parse_bool, help_heading = "Logging", global = true)]
    pub log_json: bool,
}

/// Settings after all sources are merged.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of the identity, the store and the settings; may not exist yet.
    pub home: PathBuf,
    /// The swarm.
    pub swarm: SwarmId,
    /// Its key, where it is private.
    pub key: Option<[u8; 32]>,
    /// Addresses of peers to stay connected to.
    pub peers: Vec<String>,
    /// Whether to look around on the local network.
    pub mdns: bool,
    /// Whom to talk to.
    pub access: Access,
    /// Collector of traces.
    pub otlp: Option<String>,
    /// Log filter, where one was given.
    pub log: Option<String>,
    /// Log as JSON lines.
    pub log_json: bool,
    /// The file as read, for settings that only one binary has.
    pub file: FileConfig,
}

/// Why settings are unusable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The config file is not what it should be; the text names the key and the line.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// A value in the config file.
    #[error("{path}: {key} = {value:?}: {reason}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// What it says.
        value: String,
        /// Why that is wrong.
        reason: String,
    },
    /// The key file holds no key.
    #[error("{path}: expected 64 hex digits")]
    Key {
        /// Which.
        path: PathBuf,
    },
    /// Others may read the key.
    #[error("key file {path} is readable by others (mode {mode:o}); run: chmod 600 {path}")]
    KeyMode {
        /// Which.
        path: PathBuf,
        /// Its mode bits.
        mode: u32,
    },
    /// The ticket in the home is none.
    #[error("{path}: {reason}; join again with shoal join TICKET, or remove the file")]
    Ticket {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Trusted without anybody to trust.
    #[error("--trusted lists nobody: name peers with --allow PEER, or by /p2p/PEER in --peer")]
    NobodyTrusted,
    /// The system knows no home directory.
    #[error("no home directory is known; give one with --home DIR or SHOAL_HOME")]
    NoHome,
}

impl SwarmArgs {
    /// The home directory alone: for what must work with a damaged ticket too.
    ///
    /// # Errors
    /// When the config file cannot be read, or no home is known.
    pub fn home_dir(&self) -> Result<PathBuf, ConfigError> {
        let (_, file) = self.read_file()?;
        self.home_of(&file)
    }

    fn home_of(&self, file: &FileConfig) -> Result<PathBuf, ConfigError> {
        let named = self.home.clone().or_else(|| file.home.clone());
        named.map_or_else(default_home, Ok)
    }

    /// Merges all sources.
    ///
    /// # Errors
    /// When a file cannot be read, a key is unknown or a value wrong; the text names it.
    pub fn resolve(&self) -> Result<Settings, ConfigError> {
        let (path, file) = self.read_file()?;
        let home = self.home_of(&file)?;
        let swarm = match (&self.swarm, &file.swarm) {
            (Some(swarm), _) => Some(swarm.clone()),
            (None, Some(text)) => Some(value(&path, "swarm", text)?),
            (None, None) => None,
        };
        // A ticket of another swarm than the one asked for has nothing to say.
        let ticket = load_ticket(&home)?
            .filter(|ticket| swarm.as_ref().is_none_or(|swarm| *swarm == ticket.swarm));
        let key_file = self.key_file.as_ref().or(file.key_file.as_ref());
        let key = key_file.map(|path| read_key(path)).transpose()?;
        let mut peers = if self.peer.is_empty() {
            file.peer.clone()
        } else {
            self.peer.clone()
        };
        peers.extend(
            ticket
                .iter()
                .flat_map(|ticket| ticket.addrs.iter().cloned()),
        );
        let allow = if self.allow.is_empty() {
            let parse = |text: &String| value(&path, "allow", text);
            file.allow.iter().map(parse).collect::<Result<_, _>>()?
        } else {
            self.allow.iter().copied().collect()
        };
        let access = access(allow, self.trusted || file.trusted, &peers)?;
        Ok(Settings {
            swarm: match (swarm, &ticket) {
                (Some(swarm), _) => swarm,
                (None, Some(ticket)) => ticket.swarm.clone(),
                (None, None) => value(&path, "swarm", DEFAULT_SWARM)?,
            },
            key: key.or(ticket.and_then(|ticket| ticket.key)),
            peers,
            mdns: self.mdns.or(file.mdns).unwrap_or(true),
            access,
            otlp: self.otlp.clone().or_else(|| file.otlp.clone()),
            log: self.log.clone().or_else(|| file.log.clone()),
            log_json: self.log_json || file.log_json,
            home,
            file,
        })
    }

    fn read_file(&self) -> Result<(PathBuf, FileConfig), ConfigError> {
        if let Some(path) = &self.config {
            return Ok((path.clone(), parse_file(path)?));
        }
        let homes = self.home.clone().or_else(|| default_home().ok());
        let candidates = [homes, config_dir()]
            .into_iter()
            .flatten()
            .map(|dir| dir.join("config.toml"));
        for path in candidates {
            match parse_file(&path) {
                Err(ConfigError::Read { source, .. })
                    if source.kind() == io::ErrorKind::NotFound => {}
                other => return Ok((path.clone(), other?)),
            }
        }
        Ok(Default::default())
    }
}

/// Remembers a ticket as the one this home joined with.
///
/// # Errors
/// When the file cannot be written.
pub fn save_ticket(home: &Path, ticket: &Ticket) -> Result<(), ConfigError> {
    use std::os::unix::fs::PermissionsExt;
    let path = home.join(TICKET_FILE);
    let io = |source| ConfigError::Read {
        path: path.clone(),
        source,
    };
    fs::create_dir_all(home).map_err(io)?;
    let temp = tempfile::NamedTempFile::new_in(home).map_err(io)?;
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o600)).map_err(io)?;
    fs::write(
        temp.path(),
        format!(
            "{}\n",
            ticket.to_text().map_err(|e| ConfigError::Ticket {
                path: path.clone(),
                reason: e.to_string()
            })?
        ),
    )
    .map_err(io)?;
    temp.as_file().sync_all().map_err(io)?;
    temp.persist(&path).map_err(|e| io(e.error))?;
    Ok(())
}

/// The ticket this home joined with, if it did.
///
/// # Errors
/// When there is one and it cannot be read.
pub fn load_ticket(home: &Path) -> Result<Option<Ticket>, ConfigError> {
    let path = home.join(TICKET_FILE);
    let text = match read_text(&path) {
        Ok(text) => text,
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let ticket = text.trim().parse::<Ticket>();
    ticket.map(Some).map_err(|e| ConfigError::Ticket {
        path,
        reason: e.to_string(),
    })
}

/// A count of bytes as people write it: `4G`, `512M`, `1.5GiB`, `1000000`; multiples of 1024.
///
/// # Errors
/// Says what is expected.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size; write for example 512M or 4G");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = digits.trim().parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(wrong);
    }
    let value: f64 = digits.trim().parse().map_err(|_| wrong())?;
    let bytes = value * (1u64 << shift) as f64;
    // 2^63 is far beyond any machine and exactly representable.
    if bytes.is_finite() && (0.0..9.2e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

/// Layers as `a..b`, half open.
///
/// # Errors
/// Says what is expected.
pub fn parse_layers(text: &str) -> Result<std::ops::Range<u32>, String> {
    let wrong =
        || format!("{text:?} is not a range of layers; write for example 0..4 for layers 0 to 3");
    let (start, end) = text.split_once("..").ok_or_else(wrong)?;
    let start = start.trim().parse().map_err(|_| wrong())?;
    let end = end.trim().parse().map_err(|_| wrong())?;
    if start < end {
        Ok(start..end)
    } else {
        Err(wrong())
    }
}

fn access(allow: HashSet<Peer>, trusted: bool, peers: &[String]) -> Result<Access, ConfigError> {
    if !allow.is_empty() {
        return Ok(Access::Listed(allow));
    }
    if !trusted {
        return Ok(Access::Open);
    }
    let named = peers
        .iter()
        .filter_map(|addr| addr.rsplit_once("/p2p/")?.1.parse().ok());
    let named: HashSet<Peer> = named.collect();
    if named.is_empty() {
        Err(ConfigError::NobodyTrusted)
    } else {
        Ok(Access::DialListed(named))
    }
}

fn value<T: FromStr<Err: std::fmt::Display>>(
    path: &Path,
    key: &'static str,
    text: &str,
) -> Result<T, ConfigError> {
    text.parse().map_err(|e: T::Err| ConfigError::Value {
        path: path.to_owned(),
        key,
        value: text.to_owned(),
        reason: e.to_string(),
    })
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    use std::io::Read;
    let io = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = fs::File::open(path).map_err(io)?;
    file.take(FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(io)?;
    Ok(text)
}

fn read_key(path: &Path) -> Result<[u8; 32], ConfigError> {
    let text = read_text(path)?;
    let io = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    if let Some(mode) = open_to_others(&fs::metadata(path).map_err(io)?) {
        return Err(ConfigError::KeyMode {
            path: path.to_owned(),
            mode,
        });
    }
    // Also what other libp2p programs write: two header lines, then the digits.
    let digits = text
        .lines()
        .map(str::trim)
        .rfind(|line| !line.is_empty())
        .unwrap_or_default();
    let bytes = data_encoding::HEXLOWER_PERMISSIVE
        .decode(digits.as_bytes())
        .ok();
    let key = bytes.and_then(|bytes| bytes.try_into().ok());
    key.ok_or_else(|| ConfigError::Key {
        path: path.to_owned(),
    })
}

fn strategy() -> Option<impl AppStrategy> {
    let names = AppStrategyArgs {
        top_level_domain: "org".into(),
        author: "shoal".into(),
        app_name: "shoal".into(),
    };
    choose_app_strategy(names).ok()
}

fn default_home() -> Result<PathBuf, ConfigError> {
    strategy().map(|s| s.data_dir()).ok_or(ConfigError::NoHome)
}

fn config_dir() -> Option<PathBuf> {
    strategy().map(|s| s.config_dir())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        swarm: SwarmArgs,
    }

    fn resolve(args: &[&str]) -> Result<Settings, ConfigError> {
        let args = ["x"].iter().chain(args);
        Cli::parse_from(args).swarm.resolve()
    }

    fn home(config: &str) -> tempfile::TempDir {
        let home = tempfile::tempdir().expect("temp dir");
        fs::write(home.path().join("config.toml"), config).expect("write");
        home
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let home = home("swarm = \"filed\"\nmdns = \"off\"\npeer = [\"/ip4/1.2.3.4/tcp/1\"]\n");
        let dir = home.path().to_str().expect("utf-8");
        let filed = resolve(&["--home", dir]).expect("resolves");
        assert_eq!(
            (
                filed.swarm.to_string().as_str(),
                filed.mdns,
                filed.peers.len()
            ),
            ("filed", false, 1)
        );
        let flagged =
            resolve(&["--home", dir, "--swarm", "flagged", "--mdns", "on"]).expect("resolves");
        assert_eq!(
            (flagged.swarm.to_string().as_str(), flagged.mdns),
            ("flagged", true)
        );
        let empty = tempfile::tempdir().expect("temp dir");
        let none = empty.path().join("none.toml");
        fs::write(&none, "").expect("write");
        let bare =
            resolve(&["--home", dir, "--config", none.to_str().expect("utf-8")]).expect("resolves");
        assert_eq!(
            (bare.swarm.to_string().as_str(), bare.mdns),
            (DEFAULT_SWARM, true)
        );
    }

    #[test]
    fn an_unknown_key_is_named_and_so_is_a_wrong_value() {
        let unknown = home("swram = \"x\"\n");
        let error =
            resolve(&["--home", unknown.path().to_str().expect("utf-8")]).expect_err("unknown");
        assert!(error.to_string().contains("swram"), "{error}");
        let wrong = home("swarm = \"No Such\"\n");
        let error = resolve(&["--home", wrong.path().to_str().expect("utf-8")]).expect_err("wrong");
        assert!(error.to_string().contains("swarm = \"No Such\""), "{error}");
    }

    #[test]
    fn yes_and_no_have_many_words() {
        for (word, on) in [("1", true), ("true", true), ("YES", true), ("on", true)]
            .into_iter()
            .chain([
                ("0", false),
                ("false", false),
                ("No", false),
                ("off", false),
            ])
        {
            assert_eq!(parse_bool(word), Ok(on), "{word}");
        }
        for wrong in ["", "2", "maybe", "onn"] {
            assert!(parse_bool(wrong).is_err(), "{wrong}");
        }
        for (config, on) in [("mdns = false", false), ("mdns = \"1\"", true), ("", true)] {
            let home = home(config);
            let dir = home.path().to_str().expect("utf-8");
            assert_eq!(
                resolve(&["--home", dir]).expect("resolves").mdns,
                on,
                "{config}"
            );
        }
    }

    #[test]
    fn a_key_file_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let home = home("");
        let dir = home.path().to_str().expect("utf-8");
        let path = home.path().join("swarm.key");
        fs::write(&path, "ab".repeat(32)).expect("write");
        let resolved = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            resolve(&["--home", dir, "--key-file", path.to_str().expect("utf-8")])
        };
        for mode in [0o644, 0o640, 0o602] {
            let error = resolved(mode).expect_err("open to others").to_string();
            assert!(error.contains("chmod 600"), "{error}");
        }
        assert_eq!(resolved(0o600).expect("resolves").key, Some([0xab; 32]));
        assert!(resolved(0o400).is_ok());
    }

    #[test]
    fn trusted_needs_somebody_and_takes_ids_from_addresses() {
        let home = home("");
        let dir = home.path().to_str().expect("utf-8");
        assert!(matches!(
            resolve(&["--home", dir, "--trusted"]),
            Err(ConfigError::NobodyTrusted)
        ));
        let peer = crate::Identity::generate().peer();
        let addr = format!("/ip4/1.2.3.4/tcp/1/p2p/{peer}");
        let settings = resolve(&["--home", dir, "--trusted", "--peer", &addr]).expect("resolves");
        assert_eq!(settings.access, Access::DialListed(HashSet::from([peer])));
    }

    #[test]
    fn sizes_and_layers_are_read_as_people_write_them() {
        assert_eq!(parse_bytes("4G"), Ok(4 << 30));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("123"), Ok(123));
        for wrong in ["", "G", "4X", "-1", "1e40G", "NaN", "99999999999999T"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_layers("2..5"), Ok(2..5));
        for wrong in ["5..2", "3..3", "3", "a..b", "..4"] {
            assert!(parse_layers(wrong).is_err(), "{wrong}");
        }
    }
}
