//! Swarms that place themselves, by the product's rules, in virtual time: what share of the best possible they
//! reach, and that a seed gives the same run. Fewer seeds than `shoal-testnet sim placement` has; its figures are
//! in docs/decisions/0071.

use testnet::placement::churn::churn;
use testnet::placement::{Rule, Settings, Workload, run};

/// The means that one seed must reach, smaller siblings of those of 0071, and by how much they must beat Petals' rule.
const LEAST: [(Workload, f64, f64); 3] = [
    (Workload::Churn { nodes: 100 }, 0.92, 0.04),
    (
        Workload::RegionLoss {
            nodes: 100,
            churn: false,
        },
        0.93,
        0.07,
    ),
    (
        Workload::Tight {
            nodes: 16,
            ratio: 2.5,
            together: true,
        },
        0.64,
        0.07,
    ),
];

#[test]
fn nearly_all_that_there_is_is_used_and_more_than_by_petals_rule() {
    let settings = Settings {
        nodes: vec![100],
        seed: 1,
        seeds: 1,
    };
    let mut heard = Vec::new();
    let cells = run(&settings, 2, |done, of| heard.push((done, of)));
    assert_eq!(cells.len(), 2 * 5, "a cell for each workload and rule");
    let swarms = 2 * (1 + 4 * 6);
    assert_eq!(heard.last(), Some(&(swarms, swarms)));
    assert!(cells.iter().all(|cell| cell.mean <= 1.0), "{cells:?}");
    for (workload, least, more) in LEAST {
        let mean = |rule| {
            let mut found = cells.iter();
            let found = found.find(|cell| cell.workload == workload && cell.rule == rule);
            found.map_or(f64::NAN, |cell| cell.mean)
        };
        let (shoal, petals) = (mean(Rule::Shoal), mean(Rule::Petals));
        assert!(shoal >= least, "{workload:?}: {shoal} of the upper bound");
        assert!(
            shoal >= petals + more,
            "{workload:?}: {shoal}, Petals' rule {petals}"
        );
    }
}

#[test]
fn a_seed_gives_the_same_figures_whoever_runs_it() {
    for rule in Rule::ALL {
        let elsewhere = std::thread::spawn(move || churn(5, 100, rule));
        let here = churn(5, 100, rule);
        assert_eq!(Some(&here), elsewhere.join().ok().as_ref());
        assert_ne!(here, churn(6, 100, rule));
    }
}
