//! Where this user's identity, store and settings live, for the commands that need nothing else.

use std::path::PathBuf;

use node::config::SwarmArgs;

/// The home directory flags.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Settings")]
pub struct Home {
    /// Directory of the identity, the store and the settings.
    #[arg(long, value_name = "DIR", env = "SHOAL_HOME")]
    home: Option<PathBuf>,
    /// Config file [default: config.toml in the home directory, then in the user's config directory].
    #[arg(long, value_name = "FILE", env = "SHOAL_CONFIG")]
    config: Option<PathBuf>,
}

impl Home {
    /// The directory; it may not exist yet.
    pub fn dir(&self) -> anyhow::Result<PathBuf> {
        let args = SwarmArgs {
            home: self.home.clone(),
            config: self.config.clone(),
            ..SwarmArgs::default()
        };
        Ok(args.home_dir()?)
    }
}
