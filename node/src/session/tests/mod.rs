//! Sessions over in-memory pipes with the hash-chain engine: every skipped, repeated or misordered
//! layer shows as a wrong next token.

mod chain;
mod faults;
mod forks;
mod handed_over;
mod hostile;
mod lost;
mod middle;
mod rewritten;
mod standby;
mod swarm;
mod waiting;
