// A page that is opened from the disk, whose modules browsers do not load, says what it takes.

if (location.protocol === "file:") {
  document.getElementById("status-text").textContent = "not connected";
  document.getElementById("cover").hidden = false;
  document.querySelector("#cover p").textContent = "Browsers run no page of this kind from the disk. Serve its folder: diagd web --serve, or python -m http.server there.";
}
