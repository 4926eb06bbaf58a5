// Numbers in words, and small helpers to build elements: text only, never markup.

const number = new Intl.NumberFormat("en");

export function duration(seconds) {
  if (seconds >= 9.95) return `${number.format(Math.round(seconds))} s`;
  if (seconds >= 0.9995) return `${seconds.toFixed(1)} s`;
  return seconds >= 0.00995 ? `${Math.round(seconds * 1e3)} ms` : `${(seconds * 1e3).toFixed(1)} ms`;
}

export function count(value) {
  return number.format(Math.round(value));
}

export function amount(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

export function rate(perSecond) {
  return perSecond >= 100 ? count(perSecond) : perSecond.toFixed(1);
}

export function percent(share) {
  return `${Math.round(share * 100)} %`;
}

export function byId(id) {
  return document.getElementById(id);
}

export function say(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// For screen readers, where nothing else on the page says it.
export function announce(text) {
  byId("announcer").textContent = text;
}
