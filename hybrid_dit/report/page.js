"use strict";

// One clock drives every video: videos on screen play and are held to it, those off screen rest.
function startPlayer(player) {
  const find = (name) => player.querySelector("." + name);
  const [controls, play, scrub, where, speed, loop] =
    ["controls", "play", "scrub", "where", "speed", "loop"].map(find);
  const videos = [...player.querySelectorAll("video")];
  const fps = Number(player.dataset.fps), frames = Number(player.dataset.frames), length = frames / fps;
  const onScreen = new Set(videos);
  let playing = false, time = 0, before = 0;

  const frame = () => Math.min(frames - 1, Math.floor(time * fps + 1e-6));
  const show = () => {
    const text = `frame ${frame() + 1} of ${frames}`;
    if (where.textContent !== text) {
      where.textContent = text;
      scrub.value = frame();
      scrub.setAttribute("aria-valuetext", `${text}, ${(frame() / fps).toFixed(2)} seconds`);
    }
  };
  const end = (video) => (video.duration || length) - 0.001;
  const seek = (video) => { video.currentTime = Math.min(time, end(video)); };

  // Aims at the middle of a frame, where rounding can't pick its neighbour.
  const goTo = (n) => {
    time = (Math.max(0, Math.min(frames - 1, n)) + 0.5) / fps;
    videos.forEach(seek);
    show();
  };
  const pause = () => {
    playing = false;
    play.textContent = "Play";
    videos.forEach((video) => video.pause());
    goTo(frame());
  };
  const hold = (video) => {
    if (time >= end(video)) { video.pause(); return; }
    if (video.paused) {
      seek(video);
      video.playbackRate = Number(speed.value);
      video.play().catch(() => {});
      return;
    }
    if (video.seeking) return;
    const ahead = video.currentTime - time;
    if (Math.abs(ahead) > 2 / fps) seek(video);
    else video.playbackRate = Number(speed.value) * Math.max(0.7, Math.min(1.3, 1 - 4 * ahead));
  };
  const tick = (now) => {
    if (!playing) return;
    time += Math.min(0.25, (now - before) / 1000) * Number(speed.value);
    before = now;
    if (time >= length) {
      if (!loop.checked) { time = length - 0.5 / fps; pause(); return; }
      time = 0;
      onScreen.forEach(seek);
    }
    onScreen.forEach(hold);
    show();
    requestAnimationFrame(tick);
  };

  play.addEventListener("click", () => {
    if (playing) { pause(); return; }
    if (frame() === frames - 1) time = 0;
    playing = true;
    play.textContent = "Pause";
    before = performance.now();
    requestAnimationFrame(tick);
  });
  const jump = (n) => { if (playing) pause(); goTo(n); };
  find("back").addEventListener("click", () => jump(frame() - 1));
  find("forward").addEventListener("click", () => jump(frame() + 1));
  scrub.addEventListener("input", () => jump(Number(scrub.value)));
  document.addEventListener("visibilitychange", () => { if (document.hidden && playing) pause(); });

  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) { onScreen.add(target); if (!playing) seek(target); }
      else { onScreen.delete(target); target.pause(); }
    }
  });
  for (const video of videos) {
    video.controls = false;
    video.loop = false;
    video.addEventListener("error", () => asBlob(video));
    if (video.error) asBlob(video);
    watch.observe(video);
  }
  loop.checked = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  controls.hidden = false;
}

// Some browsers refuse videos in data: addresses, but play the same bytes from a blob: address.
function asBlob(video) {
  if (!video.src.startsWith("data:")) {
    const text = document.createElement("p");
    text.className = "failed";
    text.textContent = "This browser can't play H.264 video; frames are in the folder evaluate/sheets.";
    video.replaceWith(text);
    return;
  }
  const bytes = Uint8Array.from(atob(video.src.split(",")[1]), (c) => c.charCodeAt(0));
  video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
}

// Marks of a chart: one in the tab order, arrow keys for the others, numbers below the picture.
function startChart(chart) {
  const points = [...chart.querySelectorAll(".point")];
  const readout = chart.querySelector(".readout");
  const show = (point) => { readout.textContent = point.getAttribute("aria-label"); };
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  points.forEach((point, n) => {
    point.addEventListener("pointerenter", () => show(point));
    point.addEventListener("focus", () => show(point));
    point.addEventListener("keydown", (event) => {
      const last = points.length - 1;
      const next = { Home: 0, End: last }[event.key] ?? n + (steps[event.key] ?? 0);
      if (next === n || next < 0 || next > last) return;
      event.preventDefault();
      point.tabIndex = -1;
      points[next].tabIndex = 0;
      points[next].focus();
    });
  });
}

document.querySelectorAll(".player").forEach(startPlayer);
document.querySelectorAll(".pareto").forEach(startChart);
