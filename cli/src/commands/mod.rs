//! One file per subcommand: its arguments, and `main`.

pub mod bench;
pub mod chat;
pub mod completions;
pub mod doctor;
pub mod gc;
pub mod import;
pub mod inspect;
pub mod invite;
pub mod join;
pub mod man;
pub mod models;
pub mod node;
pub mod pin;
pub mod pull;
pub mod rm;
pub mod route;
pub mod run;
pub mod serve;
pub mod sign;
pub mod status;
pub mod top;
pub mod verify;
