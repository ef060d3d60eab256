//! Alias tables (Vose's method): a weighted choice among any number of endpoints in constant time and one
//! map look-up, exact to one part in 2^32.

/// One column: take `first` if a random u32 is at most `threshold`, else `alias`. Both are indexes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) first: usize,
    pub(crate) alias: usize,
    pub(crate) threshold: u32,
}

/// Builds the table; empty if no weight is above zero.
pub(crate) fn columns(weights: &[u32]) -> Vec<Column> {
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    if total == 0 {
        return Vec::new();
    }
    let count = weights.len() as u64;
    // Each column holds `total`; endpoint i owns weights[i] * count of the whole.
    let mut left: Vec<u64> = weights
        .iter()
        .map(|weight| u64::from(*weight) * count)
        .collect();
    let mut table: Vec<Column> = (0..weights.len())
        .map(|index| Column {
            first: index,
            alias: index,
            threshold: u32::MAX,
        })
        .collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) =
        (0..weights.len()).partition(|index| left[*index] < total);
    while let (Some(poor), Some(rich)) = (small.pop(), large.pop()) {
        let share = u128::from(left[poor]) * (1 << 32) / u128::from(total);
        table[poor] = match u32::try_from(share) {
            // `random <= threshold` is never false for 0: a zero share goes wholly to the alias.
            Ok(0) => Column {
                first: rich,
                alias: rich,
                threshold: u32::MAX,
            },
            Ok(share) => Column {
                first: poor,
                alias: rich,
                threshold: share - 1,
            },
            Err(_) => table[poor],
        };
        left[rich] -= total - left[poor];
        if left[rich] < total {
            small.push(rich);
        } else {
            large.push(rich);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Share of each endpoint, computed from the table itself.
    fn shares(weights: &[u32]) -> Vec<f64> {
        let table = columns(weights);
        let mut shares = vec![0.0; weights.len()];
        for column in &table {
            let first = (f64::from(column.threshold) + 1.0) / 2f64.powi(32);
            shares[column.first] += first / table.len() as f64;
            shares[column.alias] += (1.0 - first) / table.len() as f64;
        }
        shares
    }

    #[test]
    fn nothing_to_choose_from() {
        assert_eq!(columns(&[]), vec![]);
        assert_eq!(columns(&[0, 0]), vec![]);
    }

    #[test]
    fn weight_zero_gets_nothing() {
        let shares = shares(&[1, 0, 3]);
        assert!((shares[0] - 0.25).abs() < 1e-9, "{shares:?}");
        assert!(shares[1].abs() < f64::EPSILON, "{shares:?}");
    }

    proptest! {
        #[test]
        fn every_endpoint_gets_its_share(weights in prop::collection::vec(0u32..1000, 1..60)) {
            let total: u32 = weights.iter().sum();
            prop_assume!(total > 0);
            for (share, weight) in shares(&weights).iter().zip(&weights) {
                prop_assert!((share - f64::from(*weight) / f64::from(total)).abs() < 1e-8);
            }
        }
    }
}
