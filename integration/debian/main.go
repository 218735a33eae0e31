// Command debian builds real images from Debian packages, as OCI layouts: what tests, benchmarks and the demo start.
//
//	debian -dir DIR py     DIR/py: Debian, Python, NumPy and SciPy, and a job that uses them, in four layers;
//	                       37,000 entries, 270 MB compressed. It takes about four minutes.
//	debian -dir DIR ros    DIR/ros: Debian, Python with OpenCV, ROS, and a job; 60,000 entries, 580 MB. Ten minutes.
//
// Layers are directories under DIR/layers, each the upper directory of an overlayfs mount, and are not
// built twice. It needs root, the network and mmdebstrap.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A step makes one layer above those before it.
type step struct {
	name       string   // of the layer; images that begin with the same steps share these layers
	packages   []string // what apt installs, or
	recommends bool     // with what they recommend
	files      map[string]string
}

var images = map[string][]step{
	"py": {
		{name: "python", packages: []string{"python3"}},
		{name: "scipy", packages: []string{"python3-numpy", "python3-scipy"}},
		{name: "job", files: map[string]string{"/app/main.py": job}},
	},
	"ros": {
		{name: "opencv", packages: []string{"python3", "python3-numpy", "python3-opencv"}},
		{name: "ros", packages: []string{"ros-core", "ros-robot", "python3-rospy"}, recommends: true},
		{name: "rosjob", files: map[string]string{"/app/main.py": robotJob}},
	},
}

// job says when it starts, when its imports are done and when it has an answer, which it checks.
const job = `print("START", flush=True)
import numpy
from scipy import fft, linalg, optimize, sparse, stats
print("READY", flush=True)
n = 120
a = numpy.cos(numpy.outer(numpy.arange(n), numpy.arange(n))) + n * numpy.eye(n)
x = linalg.solve(a, a @ numpy.ones(n))
assert numpy.allclose(x, 1)
assert numpy.allclose(fft.ifft(fft.fft(x)).real, x)
root = optimize.brentq(lambda t: t * t - 2, 0, 2)
assert abs(root - 2 ** 0.5) < 1e-9
assert sparse.identity(n).nnz == n and abs(stats.norm.cdf(0) - 0.5) < 1e-12
print("DONE", round(float(x.sum())), flush=True)
`

// robotJob is a test of a robot's software in small: it finds out by how much each picture was turned, and packs the answers
// into messages.
const robotJob = `print("START", flush=True)
import cv2
import io
import numpy
import rospy
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image
print("READY", flush=True)
noise = numpy.random.RandomState(1).rand(480, 640)
picture = cv2.GaussianBlur((noise * 255).astype(numpy.uint8), (9, 9), 3)
finder = cv2.ORB_create(400)
pairs = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)
points, words = finder.detectAndCompute(picture, None)
packed = io.BytesIO()
for step in range(8):
    turn = cv2.getRotationMatrix2D((320, 240), 2 * step, 1)
    seen = cv2.warpAffine(picture, turn, (640, 480))
    there, what = finder.detectAndCompute(seen, None)
    found = pairs.match(words, what)
    a = numpy.float32([points[m.queryIdx].pt for m in found])
    b = numpy.float32([there[m.trainIdx].pt for m in found])
    plane, _ = cv2.findHomography(a, b, cv2.RANSAC, 3)
    angle = numpy.degrees(numpy.arctan2(plane[0, 1], plane[0, 0]))
    assert abs(angle - 2 * step) < 1, angle
    pose = PoseStamped()
    pose.header.stamp = rospy.Time(step)
    pose.pose.orientation.z = float(angle)
    pose.serialize(packed)
    image = Image(height=480, width=640, encoding="mono8", data=seen.tobytes())
    image.serialize(packed)
print("DONE", len(packed.getvalue()), flush=True)
`

func main() {
	log.SetFlags(0)
	log.SetPrefix("debian: ")
	dir := flag.String("dir", ".", "where images and layers lie")
	flag.Parse()
	if flag.NArg() == 0 {
		log.Fatal("which image? There are: py, ros")
	}
	for _, name := range flag.Args() {
		if err := build(*dir, name); err != nil {
			log.Fatalf("%s: %v", name, err)
		}
	}
}

func build(dir, name string) error {
	steps, ok := images[name]
	if !ok {
		return errors.New("there is no such image")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	layers := []string{filepath.Join(dir, "layers", "base")}
	if err := base(layers[0], dir); err != nil {
		return fmt.Errorf("base: %w", err)
	}
	for _, s := range steps {
		layer := filepath.Join(dir, "layers", s.name)
		if err := s.build(layer, layers, dir); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		layers = append(layers, layer)
	}
	return writeLayout(filepath.Join(dir, name), layers, []string{"python3", "/app/main.py"})
}

// complete calls make with a new directory and, if it succeeds, renames that to layer. It does
// nothing if layer is there.
func complete(layer string, make func(dir string) error) error {
	if _, err := os.Stat(layer); err == nil {
		return nil
	}
	log.Printf("layer %s", filepath.Base(layer))
	if err := os.MkdirAll(filepath.Dir(layer), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(layer), "new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	root := filepath.Join(tmp, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := make(root); err != nil {
		return err
	}
	return os.Rename(root, layer)
}

// base is Debian's smallest. The package lists, which are large, are kept beside the layers.
func base(layer, dir string) error {
	lists := filepath.Join(dir, "lists")
	return complete(layer, func(root string) error {
		if err := run("mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates,tzdata",
			"--skip=cleanup/apt/lists", "bookworm", root); err != nil {
			return err
		}
		if err := errors.Join(os.RemoveAll(lists), run("cp", "-a", root+"/var/lib/apt/lists", lists)); err != nil {
			return err
		}
		// What mmdebstrap takes over from this machine.
		if err := errors.Join(os.WriteFile(root+"/etc/resolv.conf", nil, 0o644), os.WriteFile(root+"/etc/hostname", []byte("localhost\n"), 0o644)); err != nil {
			return err
		}
		return run("find", root+"/var/lib/apt/lists", "-mindepth", "1", "-delete")
	})
}

func (s step) build(layer string, below []string, dir string) error {
	return complete(layer, func(root string) error {
		work, merged := root+".work", root+".merged"
		if err := errors.Join(os.Mkdir(work, 0o755), os.Mkdir(merged, 0o755)); err != nil {
			return err
		}
		var lower []string
		for _, l := range below {
			lower = append([]string{l}, lower...)
		}
		err := mounted("overlay", "overlay", merged, 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(lower, ":"), root, work), func() error {
			for path, content := range s.files {
				path = filepath.Join(merged, path)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
					return err
				}
			}
			if len(s.packages) == 0 {
				return nil
			}
			return install(merged, s.packages, s.recommends, dir)
		})
		return errors.Join(err, os.RemoveAll(work), os.Remove(merged))
	})
}

// install runs apt in the tree at root, with what shall not become part of the layer mounted over it.
func install(root string, packages []string, recommends bool, dir string) error {
	archives := filepath.Join(dir, "archives")
	if err := os.MkdirAll(filepath.Join(archives, "partial"), 0o755); err != nil {
		return err
	}
	apt := func() error {
		return run("chroot", append([]string{root, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C",
			"apt-get", "install", "-qq", "-o", fmt.Sprintf("APT::Install-Recommends=%t", recommends), "-o", "Dpkg::Options::=--force-unsafe-io", "-o", "Dpkg::Use-Pty=0"}, packages...)...)
	}
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
	}{
		{filepath.Join(dir, "lists"), "var/lib/apt/lists", "", unix.MS_BIND},
		{archives, "var/cache/apt/archives", "", unix.MS_BIND},
		{"/etc/resolv.conf", "etc/resolv.conf", "", unix.MS_BIND},
		{"proc", "proc", "proc", 0},
		{"tmpfs", "tmp", "tmpfs", 0},
		{"tmpfs", "run", "tmpfs", 0},
	} {
		next := apt
		apt = func() error { return mounted(m.source, m.fstype, filepath.Join(root, m.target), m.flags, "", next) }
	}
	if err := apt(); err != nil {
		return err
	}
	for _, name := range []string{"pkgcache.bin", "srcpkgcache.bin"} {
		if err := os.Remove(filepath.Join(root, "var/cache/apt", name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// mounted calls f while something is mounted at target.
func mounted(source, fstype, target string, flags uintptr, data string, f func() error) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", source, target, err)
	}
	err := f()
	if umount := unix.Unmount(target, 0); umount != nil {
		err = errors.Join(err, fmt.Errorf("unmount %s: %w", target, umount), unix.Unmount(target, unix.MNT_DETACH))
	}
	return err
}

func run(name string, args ...string) error {
	c := exec.Command(name, args...)
	c.Env = append(os.Environ(), "LC_ALL=C")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w\n%s", name, args, err, out)
	}
	return nil
}
