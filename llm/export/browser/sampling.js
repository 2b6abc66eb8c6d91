// What can be drawn from logits (V): repetition penalty, temperature, top-k, top-p, then min-p, in the order and with the
// bounds of llm/generate.py. Probabilities are float64.

const FEW = 200; // of so many at most, `largest` keeps a list in order; of more it sorts them all

function softmaxOf(logits, temperature = 1) {
  let most = -Infinity, sum = 0;
  for (let id = 0; id < logits.length; id++) if (logits[id] > most) most = logits[id];
  const found = new Float64Array(logits.length);
  for (let id = 0; id < logits.length; id++) sum += found[id] = Math.exp((logits[id] - most) / temperature);
  for (let id = 0; id < logits.length; id++) found[id] /= sum;
  return found;
}

// The ids of the `count` largest values that are not below `floor`, in descending order; of equal ones the lower id first.
function largest(values, count, floor = -Infinity) {
  const found = [];
  for (let id = 0; id < values.length; id++) {
    if (values[id] < floor) continue;
    if (count > FEW) found.push(id);
    else if (found.length < count || values[id] > values[found[count - 1]]) {
      let place = Math.min(found.length, count - 1);
      for (; place && values[found[place - 1]] < values[id]; place--) found[place] = found[place - 1];
      found[place] = id;
    }
  }
  return count > FEW ? found.sort((a, b) => values[b] - values[a] || a - b).slice(0, count) : found;
}

// The logits with those of the tokens in `ids` made smaller.
function penalised(logits, ids, penalty) {
  if (penalty === 1) return logits;
  const found = logits.slice();
  for (const id of new Set(ids)) found[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return found;
}

// {ids, probabilities} of the tokens that may be drawn; ids null: all, in order. topK 0 is all, as are topP 1 and minP 0.
function candidates(logits, temperature, topK, topP, minP = 0) {
  const { ids, probabilities } = likeliest(logits, temperature, topK, topP);
  if (!minP) return { ids, probabilities };
  const least = minP * probabilities.reduce((most, p) => Math.max(most, p), 0), kept = [];
  let sum = 0;
  probabilities.forEach((p, i) => {
    if (p < least) return;
    kept.push(i);
    sum += p;
  });
  return { ids: kept.map((i) => (ids ? ids[i] : i)), probabilities: kept.map((i) => probabilities[i] / sum) };
}

function likeliest(logits, temperature, topK, topP) { // without min-p
  if (temperature === 0) return { ids: largest(logits, 1), probabilities: [1] };
  const all = softmaxOf(logits, temperature);
  if (!topK && topP === 1) return { ids: null, probabilities: all };
  // tokens less likely than (1 - topP) / V have less than 1 - topP together, so without top-k none of them is needed
  let ids = largest(all, topK || all.length, topK ? 0 : (1 - topP) / all.length);
  let sum = topK ? ids.reduce((total, id) => total + all[id], 0) : 1;
  if (topP < 1) {
    let before = 0, kept = 0;
    while (kept < ids.length && (kept === 0 || before / sum < topP)) before += all[ids[kept++]];
    ids = ids.slice(0, kept);
    sum = before;
  }
  return { ids, probabilities: ids.map((id) => all[id] / sum) };
}

function draw({ ids, probabilities }) {
  let left = Math.random(), last = 0;
  for (let i = 0; i < probabilities.length; i++) {
    if (probabilities[i] > 0) last = i; // drawn if rounding has left the sum a little below 1
    if ((left -= probabilities[i]) < 0) break;
  }
  return ids ? ids[last] : last;
}
