//! The daemon: `node::daemon` behind a `main`.

fn main() {}
