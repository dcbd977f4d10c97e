//! A table of very many ids in little memory: sorted shards that grow by eighths.
//!
//! A hash table doubles: for a moment it holds the old and the new slots, and half of these are empty afterwards.
//! Digests are spread evenly, so that their first bits choose a shard, and a shard of some hundred entries is cheap to
//! keep sorted. An entry costs its own size and an eighth.

use std::mem;

use crate::IdDigest;

/// Entries of a shard, on average, above which the shards are split.
const MAX_MEAN_ENTRIES: usize = 256;
/// A split makes two to the power of this many of each shard.
const SPLIT_BITS: u32 = 2;
/// Entries for which an empty shard makes room.
const MIN_GROWTH: usize = 4;

type Shard<V> = Vec<(IdDigest, V)>;

/// Values by id. With `()` as value, a set.
#[derive(Clone, Debug)]
pub struct IdTable<V = ()> {
    /// In the order of their ids: together they are one sorted list.
    shards: Vec<Shard<V>>,
    /// Number of leading bits that choose the shard.
    num_bits: u32,
    len: usize,
}

impl<V> Default for IdTable<V> {
    fn default() -> Self {
        Self { shards: vec![Vec::new()], num_bits: 0, len: 0 }
    }
}

impl<V: Copy> IdTable<V> {
    /// Number of ids.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of `id`.
    pub fn get(&self, id: &IdDigest) -> Option<V> {
        let shard = &self.shards[shard_of(id, self.num_bits)];
        position(shard, id).ok().map(|at| shard[at].1)
    }

    /// Adds `id` with `value`, unless it is there: then its value stays, and is given.
    pub fn insert(&mut self, id: IdDigest, value: V) -> Option<V> {
        let shard = &mut self.shards[shard_of(&id, self.num_bits)];
        let at = match position(shard, &id) {
            Ok(at) => return Some(shard[at].1),
            Err(at) => at,
        };
        if shard.len() == shard.capacity() {
            shard.reserve_exact((shard.len() / 8).max(MIN_GROWTH));
        }
        shard.insert(at, (id, value));
        self.len += 1;
        if self.len > self.shards.len() * MAX_MEAN_ENTRIES {
            self.split();
        }
        None
    }

    /// Takes `id` out; its value.
    pub fn remove(&mut self, id: &IdDigest) -> Option<V> {
        let shard = &mut self.shards[shard_of(id, self.num_bits)];
        let at = position(shard, id).ok()?;
        self.len -= 1;
        Some(shard.remove(at).1)
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn split(&mut self) {
        self.num_bits += SPLIT_BITS;
        let num_bits = self.num_bits;
        let parts = |(number, shard): (usize, Shard<V>)| {
            let first = number << SPLIT_BITS;
            let begin_of = move |part: usize, shard: &Shard<V>| {
                shard.partition_point(|(id, _)| shard_of(id, num_bits) < part)
            };
            (first..first + (1 << SPLIT_BITS)).map(move |part| {
                let range = begin_of(part, &shard)..begin_of(part + 1, &shard);
                shard[range].to_vec()
            })
        };
        let shards = mem::take(&mut self.shards);
        self.shards = Vec::with_capacity(shards.len() << SPLIT_BITS);
        self.shards.extend(shards.into_iter().enumerate().flat_map(parts));
    }
}

/// Number of the shard that the first bits of `id` choose.
fn shard_of(id: &IdDigest, num_bits: u32) -> usize {
    let [a, b, c, d, ..] = id.0;
    let head = u64::from(u32::from_be_bytes([a, b, c, d]));
    (head >> (u32::BITS - num_bits)) as usize
}

fn position<V>(shard: &Shard<V>, id: &IdDigest) -> Result<usize, usize> {
    shard.binary_search_by(|(other, _)| other.cmp(id))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::JobId;

    #[test]
    fn table_holds_what_a_map_holds() {
        let (mut table, mut map) = (IdTable::<u32>::default(), HashMap::new());
        for number in 0..20_000_u32 {
            // Every third comes again, every seventh goes.
            let id = JobId((number - number % 3).to_string()).digest();
            assert_eq!(table.insert(id, number), map.get(&id).copied());
            map.entry(id).or_insert(number);
            if number % 7 == 0 {
                let gone = JobId((number / 2).to_string()).digest();
                assert_eq!(table.remove(&gone), map.remove(&gone));
            }
            assert_eq!(table.len(), map.len());
        }
        assert!(table.shards.len() > 1, "too few for a split");
        for number in 0..20_001_u32 {
            let id = JobId(number.to_string()).digest();
            assert_eq!(table.get(&id), map.get(&id).copied());
        }
        table.clear();
        assert!(table.is_empty() && table.get(&JobId("0".into()).digest()).is_none());
    }

    #[test]
    fn an_entry_costs_its_size_and_a_quarter_at_most() {
        let mut table = IdTable::<()>::default();
        for number in 0..100_000 {
            table.insert(JobId(number.to_string()).digest(), ());
        }
        let room: usize = table.shards.iter().map(Vec::capacity).sum();
        assert!(room * 4 <= table.len() * 5, "room for {room} entries");
    }
}
