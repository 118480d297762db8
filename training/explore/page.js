// What the page does, run once it is there. Its models and figures come from page.py, as names.
const data = source.data
const CELLS = 16 // pictures across a map
const MOST = 10 // px from an image that a click still means it
const plain = (words) => String(words).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`)

function picture(i, frame) {
  const told = [data.path[i], data.class ? data.class[i] : ""].filter(Boolean).join(", ")
  return `<img src="${data.thumb[i]}" title="${plain(told)}" data-image="${i}"
    style="width:64px;height:64px;margin:2px;border:3px solid ${frame}">`
}

// Pictures on a map: of every cell of what is in view the image nearest to its middle.
function lay(side) {
  const x = data[`x${side}`], y = data[`y${side}`]
  const {x_range, y_range} = maps[side]
  const best = new Map()
  for (let i = 0; i < x.length; i++) {
    const across = CELLS * (x[i] - x_range.start) / (x_range.end - x_range.start)
    const up = CELLS * (y[i] - y_range.start) / (y_range.end - y_range.start)
    if (across < 0 || across >= CELLS || up < 0 || up >= CELLS) continue
    const cell = Math.floor(across) * CELLS + Math.floor(up)
    const off = Math.hypot(across % 1 - 0.5, up % 1 - 0.5)
    if (!best.has(cell) || off < best.get(cell)[0]) best.set(cell, [off, i])
  }
  const shown = with_pictures.active ? [...best.values()].map(([, i]) => i) : []
  laid[side].data = {
    x: shown.map((i) => x[i]), y: shown.map((i) => y[i]),
    url: shown.map((i) => data.thumb[i]), colour: shown.map((i) => data.colour[i]),
  }
}
const lay_all = () => maps.forEach((_, side) => lay(side))

// The nearest neighbours of an image under each kind of features.
function choose(i) {
  const alike = (j) => !data.class || !data.class[i] ? "#dddddd" : data.class[j] == data.class[i] ? "#3a923a" : "#c03d3e"
  const rows = near.map((found, side) => {
    const count = found.length / data.path.length
    const ones = Array.from(found.slice(i * count, (i + 1) * count))
    return `<div>nearest ${plain(names[side])}</div><div class="near">${ones.map((j) => picture(j, alike(j))).join("")}</div>`
  })
  const about = [data.path[i], data.class ? `class ${data.class[i] || "unknown"}` : "", data.cluster ? data.cluster[i] : ""]
  panel.text = `<div style="display:flex;gap:1em"><div><div>chosen</div>${picture(i, "black")}</div>
    <div>${rows.join("")}</div></div><div>${about.filter(Boolean).map(plain).join("; ")}</div>`
  chosen.data = Object.fromEntries(Object.keys(chosen.data).map((name) => [name, [data[name][i]]]))
}

function clicked(side, event) {
  const {x_range, y_range, inner_width, inner_height} = maps[side]
  const wide = inner_width / (x_range.end - x_range.start), high = inner_height / (y_range.end - y_range.start)
  let best = -1, least = Infinity
  for (let i = 0; i < data.path.length; i++) {
    const off = Math.hypot((data[`x${side}`][i] - event.x) * wide, (data[`y${side}`][i] - event.y) * high)
    if (off < least) [best, least] = [i, off]
  }
  if (least < MOST || laid[side].data.x.length && least < 2 * MOST) choose(best)
}

function recolour() {
  data.colour = data[`colour by ${colour_by.value}`]
  source.change.emit()
  legend.text = legends[colour_by.value]
  lay_all()
}

function list() {
  const {about, images, others, scores, notes} = lists[which.value]
  const other = (name) => others.length ? others.map((j) => data[name][j]) : images.map(() => "")
  told.text = plain(about)
  table.source.selected.indices = []
  table.source.data = {
    index: images, thumb: images.map((i) => data.thumb[i]), path: images.map((i) => data.path[i]),
    class: images.map((i) => data.class ? data.class[i] : ""), other: other("thumb"), other_path: other("path"),
    score: scores.map((score) => Number(score.toPrecision(3))), note: notes.length ? notes : images.map(() => ""),
  }
  for (const column of table.columns) column.visible = table.source.data[column.field].some((value) => value !== "")
}

function save_list() {
  const columns = ["path", "class", "other_path", "score", "note"]
  const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`
  const rows = table.source.data.path.map((_, row) => columns.map((name) => quoted(table.source.data[name][row])))
  const text = [["list", ...columns], ...rows.map((row) => [quoted(which.value), ...row])].join("\r\n") + "\r\n"
  const link = document.createElement("a")
  link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}))
  link.download = `${which.value.replaceAll(" ", "_")}.csv`
  link.click()
  URL.revokeObjectURL(link.href)
}

maps.forEach((map, side) => {
  let waiting
  const later = () => {
    clearTimeout(waiting)
    waiting = setTimeout(() => lay(side), 100)
  }
  for (const range of [map.x_range, map.y_range]) range.change.connect(later)
  map.on_event("tap", (event) => clicked(side, event))
})
colour_by.properties.value.change.connect(recolour)
with_pictures.properties.active.change.connect(lay_all)
which.properties.value.change.connect(list)
table.source.selected.properties.indices.change.connect(() => {
  const row = table.source.selected.indices[0]
  if (row !== undefined) choose(table.source.data.index[row])
})
save.on_event("button_click", save_list)
recolour()
list()
choose(0)
document.body.dataset.ready = "yes"
